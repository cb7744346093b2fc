//! All there is to tell at one moment: what was counted, and what nodes, engines and this process are like now.
use super::metrics::Family;
use super::names::*;
use super::{Telemetry, power};
use crate::driver::{Driver, NodeInfo};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use weir_node::{Resident, Worker};
use weir_scheduler::{Load, ModelView, NodeView, Trust};

/// A node that has said nothing for so long isn't up.
const SILENT_MAX: Duration = Duration::from_secs(5);

/// Of a scheduler, its nodes and its gateway.
pub async fn gather(driver: &Driver) -> Vec<Family> {
    let (nodes, load) = driver.measure().await;
    let mut all = counted(driver.telemetry());
    all.extend(queue(&nodes, load));
    all.extend(of_nodes(&nodes));
    all.extend(engines(&driver.residents()));
    all.extend(machine());
    all
}

/// Of a node that isn't the scheduler's own.
pub async fn gather_node(telemetry: &Telemetry, worker: &Worker) -> Vec<Family> {
    let mut all = counted(telemetry);
    all.extend(engines(&worker.residents()));
    all.extend(machine());
    all
}

/// What was counted as it happened.
pub(super) fn counted(telemetry: &Telemetry) -> Vec<Family> {
    let mut all = telemetry.meters().families();
    all.push(Family::new(&DROPPED).with(&[], telemetry.dropped() as f64));
    all
}

fn queue(nodes: &[NodeInfo], load: Load) -> Vec<Family> {
    let one = |metric, value: usize| Family::new(metric).with(&[], value as f64);
    let ours = nodes.iter().filter(|node| node.view.trust != Trust::Provider);
    let models = || ours.clone().flat_map(|node| &node.view.models).filter(|model| model.alive);
    let slots: u64 = models().map(|model| u64::from(model.slots)).sum();
    let running: u64 = models().map(|model| u64::from(model.running)).sum();
    let saturation = (running + load.waiting as u64) as f64 / slots.max(1) as f64;
    vec![
        one(&QUEUE_WAITING, load.waiting),
        one(&QUEUE_RUNNING, load.running),
        one(&QUEUE_HEDGED, load.hedged),
        Family::new(&QUEUE_SATURATION).with(&[], saturation),
        one(&NODES, load.nodes),
    ]
}

fn of_nodes(nodes: &[NodeInfo]) -> Vec<Family> {
    let metrics = [&NODE_UP, &NODE_SILENT, &NODE_DRAINING, &NODE_RESTS, &NODE_MEMORY, &NODE_BANDWIDTH];
    let mut of_node = metrics.map(Family::new);
    let metrics = [
        &NODE_ALIVE,
        &NODE_TOKENS,
        &NODE_RUNNING,
        &NODE_SLOTS,
        &NODE_TOKEN_TIME,
        &NODE_PREFILL,
        &NODE_KV,
        &NODE_KV_USED,
        &NODE_SHARE,
    ];
    let mut of_model = metrics.map(Family::new);
    let flag = |is: bool| Some(f64::from(u8::from(is)));
    for NodeInfo { view, .. } in nodes {
        let up = !view.draining && view.silent < SILENT_MAX && view.models.iter().all(|m| m.alive);
        let values = [
            flag(up),
            Some(view.silent.as_secs_f64()),
            flag(view.draining),
            Some(view.rests.as_secs_f64()),
            Some(view.memory_free as f64),
            (view.bandwidth > 0).then_some(view.bandwidth as f64),
        ];
        let labels = [(L_NODE, view.name.as_str()), (L_TRUST, view.trust.name())];
        push(&mut of_node, &values, &labels);
        for model in &view.models {
            let (free, all) = model.kv_blocks;
            let used = (all > 0).then(|| f64::from(all.saturating_sub(free)) / f64::from(all));
            let values = [
                flag(model.alive),
                Some(model.tokens as f64),
                Some(f64::from(model.running)),
                Some(f64::from(model.slots)),
                Some(model.token_time.as_secs_f64()),
                Some(f64::from(model.prefill_tokens_per_s)),
                (all > 0).then_some(f64::from(all)),
                used,
                share(view, model),
            ];
            push(&mut of_model, &values, &[(L_NODE, &view.name), (L_MODEL, &model.name)]);
        }
    }
    of_node.into_iter().chain(of_model).collect()
}

fn push(families: &mut [Family], values: &[Option<f64>], labels: &[(&'static str, &str)]) {
    for (family, value) in families.iter_mut().zip(values) {
        if let Some(value) = value {
            family.push(labels, *value);
        }
    }
}

/// Each step reads all weights once, however many sequences decode in it; without any it reads none.
fn share(node: &NodeView, model: &ModelView) -> Option<f64> {
    let known = node.bandwidth > 0 && model.weights > 0 && !model.token_time.is_zero();
    let share = model.weights as f64 / model.token_time.as_secs_f64() / node.bandwidth as f64;
    known.then_some(if model.running > 0 { share } else { 0.0 })
}

/// Of this process.
fn engines(residents: &[Resident]) -> Vec<Family> {
    let metrics = [
        &ENGINE_TOKENS,
        &ENGINE_PROMPT,
        &ENGINE_STEPS,
        &ENGINE_GUESSED,
        &ENGINE_RIGHT,
        &ENGINE_RUNNING,
        &ENGINE_QUEUED,
        &ENGINE_KV_USED,
    ];
    let mut families = metrics.map(Family::new);
    for resident in residents {
        let status = resident.engine_status();
        let in_use = status.kv_blocks_total.saturating_sub(status.kv_blocks_free + status.kv_blocks_cached);
        let values = [
            status.tokens_generated as f64,
            status.prompt_tokens as f64,
            status.steps as f64,
            status.guessed as f64,
            status.guessed_right as f64,
            status.running as f64,
            status.queued as f64,
            in_use as f64 / status.kv_blocks_total.max(1) as f64,
        ];
        push(&mut families, &values.map(Some), &[(L_MODEL, resident.name())]);
    }
    families.into()
}

fn machine() -> Vec<Family> {
    let mut all = power::families();
    all.push(Family::new(&BUILD).with(&[("version", env!("CARGO_PKG_VERSION"))], 1.0));
    all.extend(process());
    all
}

/// From Linux' `/proc/self`; nothing elsewhere.
fn process() -> Vec<Family> {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may have spaces: field 3 and those that follow.
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    // Linux tells both in ticks of 10 ms, pages of 4 KiB being usual and `statm` in pages: VmRSS is in KiB whatever they are.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok());
    let mut all = Vec::new();
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        all.push(Family::new(&PROCESS_CPU).with(&[], (user + system) / 100.0));
    }
    if let Some(kib) = resident {
        all.push(Family::new(&PROCESS_MEMORY).with(&[], kib * 1024.0));
    }
    all.extend(began().map(|at| Family::new(&PROCESS_START).with(&[], at)));
    all
}

/// When this process began to count.
pub(super) fn began() -> Option<f64> {
    static BEGAN: std::sync::OnceLock<SystemTime> = std::sync::OnceLock::new();
    Some(BEGAN.get_or_init(SystemTime::now).duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
}
