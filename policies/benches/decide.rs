//! What a policy file adds to a decision: `cargo bench -p weir-policies --bench decide`.
//!
//! For each policy: a request is judged and a hundred offers are filtered and weighed; then whole decisions of the scheduler,
//! from a request that comes to the node it goes to, with pools of several sizes. Fails beyond 500 us at p99.
use std::hint::black_box;
use std::time::{Duration, Instant};
use weir_policies::{Rules, SHIPPED};
use weir_scheduler::{
    Ask, Generate, Held, Input, KvType, Limits, ModelId, NodeId, Offer, Policy, PoolView, Price, Priority,
    Profile, Rates, RequestId, Scheduler, Time, Trust,
};

const OFFERS: usize = 100;
const ROUNDS: usize = 5000;
const P99_MAX_US: f64 = 500.0;

/// Twenty rules of all kinds, none of which ends a decision early.
const MANY: &str = include_str!("many.toml");

fn main() {
    println!("| policy | rules | 100 offers, p50 | p99 |\n| --- | --- | --- | --- |");
    for policy in &SHIPPED {
        row(policy.name, policy.text);
    }
    row("twenty rules", MANY);
    reference();
    println!("\n| policy, nodes | request placed, p50 | p99 |\n| --- | --- | --- |");
    for nodes in [10, 100, 1000, 10_000] {
        placed("spill-when-busy", SHIPPED[4].text, nodes);
        placed("twenty rules", MANY, nodes);
    }
}

/// Whole decisions, in a pool of which half is ours.
fn placed(name: &str, text: &str, nodes: u64) {
    let rules = Rules::parse(text).unwrap_or_else(|why| panic!("{name}: {why}"));
    let mut scheduler = Scheduler::new(Limits::default(), Box::new(rules), 1);
    for n in 0..nodes {
        let trust = [Trust::Own, Trust::Guest, Trust::Own, Trust::Provider][n as usize % 4];
        let price = Price { prompt: 0, output: n % 7 * 100 };
        let models = vec![held()];
        let profile = Profile {
            name: format!("n{n}"),
            identity: n + 1,
            trust,
            labels: labels(),
            price,
            models,
            ..Profile::default()
        };
        scheduler.handle(Time::ZERO, Input::Connected { node: NodeId(n), profile });
    }
    let mut times: Vec<u64> = Vec::with_capacity(ROUNDS);
    for id in 0..ROUNDS as u64 {
        let tags = vec![("team".to_owned(), "blue".to_owned())];
        let prompt = (0..600).map(|at| id as u32 + at).collect();
        let ask = Generate { request: RequestId(id), tags, ..Generate::new(ModelId([1; 32]), prompt, 200) };
        let now = Time(id * 1000);
        let began = Instant::now();
        scheduler.handle(now, Input::Submit(Box::new(ask)));
        times.push(began.elapsed().as_nanos() as u64);
        // Half of the places stay taken, if there are so many.
        if let Some(old) = id.checked_sub((nodes * 4).min(1000)) {
            scheduler.handle(now, Input::Cancel(RequestId(old)));
        }
        while scheduler.poll().is_some() {}
    }
    times.sort_unstable();
    let us = |at: usize| times[at] as f64 / 1e3;
    let (p50, p99) = (us(ROUNDS / 2), us(ROUNDS * 99 / 100));
    println!("| {name}, {nodes} | {p50:.1} us | {p99:.1} us |");
    assert!(nodes > 100 || p99 <= P99_MAX_US, "{name}: a decision takes {p99} us");
}

fn row(name: &str, text: &str) {
    let rules = Rules::parse(text).unwrap_or_else(|why| panic!("{name}: {why}"));
    let (held, labels) = (held(), labels());
    let offers: Vec<Offer<'_>> = (0..OFFERS).map(|n| offer(n, &held, &labels)).collect();
    let (tags, pool) = (
        vec![("team".to_owned(), "blue".to_owned())],
        PoolView { own_free: 3, own: 9, ..PoolView::default() },
    );
    let ask = ask(&tags);
    let mut times: Vec<u64> =
        (0..ROUNDS + 500).map(|_| decide(&rules, black_box(&ask), &pool, &offers)).skip(500).collect();
    times.sort_unstable();
    let us = |at: usize| times[at] as f64 / 1e3;
    let (p50, p99) = (us(ROUNDS / 2), us(ROUNDS * 99 / 100));
    println!("| {name} | {} | {p50:.1} us | {p99:.1} us |", rules.len());
    assert!(p99 <= P99_MAX_US, "{name}: a decision takes {p99} us");
}

/// Nanoseconds of a decision.
fn decide(rules: &Rules, ask: &Ask<'_>, pool: &PoolView, offers: &[Offer<'_>]) -> u64 {
    let began = Instant::now();
    let decision = rules.begin(ask, pool);
    let kept = offers.iter().filter(|offer| decision.admits(offer).is_ok());
    let best = kept.map(|offer| decision.cost(offer)).fold(f64::MAX, f64::min);
    black_box(best);
    began.elapsed().as_nanos() as u64
}

/// The same three-term rule for one node: by the `cel` crate, and by ours.
fn reference() {
    let rule = "node_trust == 'own' && node_load < 0.9 && 'team' in tags";
    let program = cel::Program::compile(rule).expect("it is CEL");
    let mut times = Vec::new();
    for _ in 0..2000 {
        let began = Instant::now();
        let mut context = cel::Context::default();
        context.add_variable_from_value("node_trust", "own");
        context.add_variable_from_value("node_load", 0.5);
        context.add_variable_from_value("tags", std::collections::HashMap::from([("team", "blue")]));
        black_box(program.execute(&context).expect("it has a value"));
        times.push(began.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    println!(
        "\nOne rule of three terms, one node: the `cel` crate takes {:.1} us.",
        times[1000] as f64 / 1e3
    );
}

fn ask(tags: &[(String, String)]) -> Ask<'_> {
    Ask {
        key: "blue",
        tags,
        priority: Priority::Interactive,
        prompt_tokens: 800,
        max_tokens: 500,
        output_tokens: 0,
        model: "llama-8b",
        model_bytes: 5_000_000_000,
        ttft: Some(Duration::from_millis(800)),
        deadline: None,
        max_cost: Some(50_000_000),
        waited: Duration::ZERO,
    }
}

fn labels() -> Vec<(String, String)> {
    let pairs = [("kind", "server"), ("country", "DE"), ("zone", "cellar"), ("rack", "7")];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

fn held() -> Held {
    let (alone, full) = (Duration::from_millis(10), Duration::from_millis(20));
    Held {
        model: ModelId([1; 32]),
        name: "llama-8b".into(),
        text: None,
        context: 8192,
        numerics: "cuda/q4".into(),
        kv: KvType::F16,
        kv_blocks: 1000,
        slots: 16,
        rates: Rates { prefill_tokens_per_s: 2000.0, token_time_alone: alone, token_time_full: full },
        weights: 5_000_000_000,
        bytes: 6_000_000_000,
        pinned: true,
        resumes: true,
        grammars: true,
        prefixes: Vec::new(),
    }
}

fn offer<'a>(n: usize, held: &'a Held, labels: &'a [(String, String)]) -> Offer<'a> {
    Offer {
        node: NodeId(n as u64),
        name: "gpu-17",
        trust: if n.is_multiple_of(10) { Trust::Provider } else { Trust::Own },
        labels,
        held,
        resident: true,
        running: (n % 16) as u32,
        ttft: Duration::from_millis(100 + n as u64),
        total: Duration::from_millis(3000 + n as u64),
        price: Price { prompt: 500, output: 1500 },
        cost: 700_000,
        worst: 1_200_000,
        late: false,
        burden: Duration::from_millis(40),
        same_numerics: true,
    }
}
