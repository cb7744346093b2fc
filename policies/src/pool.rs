//! Pools and requests that are written down: for explanations and tables of expectations.
use crate::place::{Problem, Problems};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use weir_scheduler::{Held, KvType, ModelId, NodeId, Offer, PoolView, Price, Priority, Rates, Trust};

/// Nodes of a pool that is written down, at most.
pub(crate) const NODES_MAX: usize = 4096;

/// A pool.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolFile {
    /// Its nodes.
    #[serde(rename = "node")]
    pub nodes: Vec<NodeFile>,
    /// Other requests that wait for the same model.
    pub queue: usize,
    /// Requests that wait, for any model; as many as `queue` where it isn't said.
    pub waiting: Option<usize>,
    /// Requests at providers; as many as run there where it isn't said.
    pub spilling: Option<usize>,
    /// What time it is: `Mon 10:30`.
    pub time: Option<String>,
}

/// A node of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeFile {
    /// Its name.
    pub name: String,
    /// `own`, `guest`, `provider`; `own` where it isn't said.
    pub trust: Option<String>,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// What a million tokens of prompts cost there, in dollars.
    pub prompt_usd_per_mtok: f64,
    /// The same of output.
    pub output_usd_per_mtok: f64,
    /// It gets nothing new.
    pub draining: bool,
    /// What it holds.
    pub models: Vec<ModelFile>,
}

/// A model on it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelFile {
    /// Its name.
    pub name: String,
    /// Bytes of its file.
    pub bytes: u64,
    /// Longest sequence in tokens.
    pub context: u32,
    /// Sequences that run at once.
    pub slots: u32,
    /// Requests that run.
    pub running: u32,
    /// Prompt tokens a second.
    pub prefill_tokens_per_s: f32,
    /// From one token to the next, alone.
    pub token_ms: f64,
    /// The same with all slots running; as alone where it isn't said.
    pub token_ms_full: Option<f64>,
    /// Kernel family, activation and KV types.
    pub numerics: String,
}

impl Default for ModelFile {
    fn default() -> Self {
        ModelFile {
            name: String::new(),
            bytes: 0,
            context: 32_768,
            slots: 4,
            running: 0,
            prefill_tokens_per_s: 1000.0,
            token_ms: 20.0,
            token_ms_full: None,
            numerics: String::new(),
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestFile {
    /// The model's name.
    pub model: String,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// `background`, `normal` or `interactive`.
    pub priority: String,
    /// The name of its key.
    pub key: String,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Tokens of output, at most.
    pub max_tokens: u32,
    /// Tokens of output that are expected.
    pub expected_tokens: u32,
    /// Tokens that it has already.
    pub output_tokens: u32,
    /// Numerics that those came from; any, if empty.
    pub numerics: String,
    /// The first token must come within this.
    pub ttft_ms: Option<f64>,
    /// The last token must come within this.
    pub deadline_ms: Option<f64>,
    /// What it may cost.
    pub max_usd: Option<f64>,
    /// How long it has waited.
    pub waited_ms: f64,
}

impl Default for RequestFile {
    fn default() -> Self {
        RequestFile {
            model: String::new(),
            tags: BTreeMap::new(),
            priority: "normal".into(),
            key: String::new(),
            prompt_tokens: 100,
            max_tokens: 256,
            expected_tokens: 256,
            output_tokens: 0,
            numerics: String::new(),
            ttft_ms: None,
            deadline_ms: None,
            max_usd: None,
            waited_ms: 0.0,
        }
    }
}

/// Bytes of text in a token, about.
const BYTES_PER_TOKEN: usize = 4;

impl RequestFile {
    /// From JSON: the fields of this type, or a request as clients send it to the gateway, whose prompt's tokens are then
    /// guessed.
    pub fn from_json(value: &Value) -> Result<RequestFile, String> {
        let as_sent = ["messages", "prompt", "input", "weir"].iter().any(|name| value.get(name).is_some());
        if !as_sent {
            return serde_json::from_value(value.clone()).map_err(|e| e.to_string());
        }
        let mut own = value.get("weir").cloned().unwrap_or_else(|| Value::Object(Default::default()));
        let fields = own.as_object_mut().ok_or("`weir` must be an object")?;
        // Known to the gateway, not to policies.
        fields.remove("model_size");
        for name in ["model", "max_tokens"] {
            if let Some(value) = value.get(name) {
                fields.insert(name.into(), value.clone());
            }
        }
        if let Some(most) = value.get("max_completion_tokens").or_else(|| value.get("max_output_tokens")) {
            fields.insert("max_tokens".into(), most.clone());
        }
        let bytes: usize = ["messages", "prompt", "input", "system"]
            .iter()
            .filter_map(|name| value.get(name))
            .map(text_bytes)
            .sum();
        fields.insert("prompt_tokens".into(), bytes.div_ceil(BYTES_PER_TOKEN).max(1).into());
        serde_json::from_value(own).map_err(|e| e.to_string())
    }

    pub(crate) fn priority(&self) -> Result<Priority, String> {
        Ok(match self.priority.as_str() {
            "background" => Priority::Background,
            "normal" => Priority::Normal,
            "interactive" => Priority::Interactive,
            other => {
                return Err(format!("`{other}` is no priority; there are background, normal, interactive"));
            }
        })
    }
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}

/// Milliseconds that make sense.
pub(crate) fn duration(ms: f64) -> Duration {
    Duration::from_secs_f64((ms / 1e3).clamp(0.0, 1e9))
}

/// Dollars in billionths.
pub(crate) fn nano(usd: f64) -> u64 {
    (usd * 1e9).round() as u64
}

impl PoolFile {
    /// Reads one that is written down.
    pub fn parse(text: &str) -> Result<PoolFile, Problems> {
        toml::from_str(text).map_err(|e| Problems(vec![Problem::of_toml(text, &e)]))
    }

    /// From what a scheduler says of its nodes (`GET /weir/v1/nodes`): those that are connected.
    pub fn from_survey(survey: &Value) -> PoolFile {
        let all = survey.get("nodes").unwrap_or(survey).as_array().map(Vec::as_slice).unwrap_or_default();
        let here = all.iter().filter(|node| matches!(node["state"].as_str(), Some("connected" | "draining")));
        PoolFile { nodes: here.take(NODES_MAX).map(NodeFile::from_survey).collect(), ..PoolFile::default() }
    }

    /// Checks what the types don't say.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.nodes.len() > NODES_MAX {
            return Err(format!("there are {} nodes; at most {NODES_MAX}", self.nodes.len()));
        }
        for node in &self.nodes {
            let of = |what: &str| Err(format!("node `{}`: {what}", node.name));
            let prices = [node.prompt_usd_per_mtok, node.output_usd_per_mtok];
            if node.trust.as_deref().is_some_and(|trust| Trust::named(trust).is_none()) {
                return of("its trust is none of own, guest, provider");
            }
            if !prices.iter().all(|usd| (0.0..=1e6).contains(usd)) {
                return of("a price is below 0 or too large");
            }
            for model in &node.models {
                let times = [model.token_ms, model.token_ms_full.unwrap_or(0.0)];
                if !times.iter().all(|ms| (0.0..=1e6).contains(ms)) {
                    return of("the time of a token is below 0 or too long");
                }
                if !(model.prefill_tokens_per_s > 0.0 && model.prefill_tokens_per_s.is_finite()) {
                    return of("prefill_tokens_per_s is not above 0");
                }
            }
        }
        self.time.as_deref().map_or(Ok(()), |time| clock(time).map(|_| ()))
    }

    /// What policies see of it.
    pub(crate) fn view(&self, model: &str) -> PoolView {
        let count = |trust: Trust| self.nodes.iter().filter(|node| node.trust() == trust).count();
        let running = |node: &NodeFile| node.models.iter().map(|m| m.running as usize).sum::<usize>();
        let at_providers = self.nodes.iter().filter(|node| node.trust() == Trust::Provider).map(running);
        let own = self.nodes.iter().filter(|node| node.trust() == Trust::Own);
        let holding: Vec<(&NodeFile, &ModelFile)> =
            own.filter_map(|node| Some((node, node.models.iter().find(|m| m.name == model)?))).collect();
        let clock = self.time.as_deref().and_then(|time| clock(time).ok());
        PoolView {
            queue: self.queue,
            waiting: self.waiting.unwrap_or(self.queue),
            running: self.nodes.iter().map(running).sum(),
            spilling: self.spilling.unwrap_or_else(|| at_providers.sum()),
            nodes: self.nodes.len(),
            own: count(Trust::Own),
            guests: count(Trust::Guest),
            providers: count(Trust::Provider),
            own_holding: holding.len(),
            own_free: holding.iter().filter(|(node, model)| !node.draining && model.has_room()).count(),
            clock,
        }
    }
}

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];

/// `Mon 10:30`, of some week.
fn clock(time: &str) -> Result<weir_scheduler::Clock, String> {
    let parsed = || {
        let (day, time) = time.split_once(' ')?;
        let day = DAYS.iter().position(|known| *known == day)?;
        let (hour, minute) = time.split_once(':')?;
        let (hour, minute): (i64, i64) = (hour.parse().ok()?, minute.parse().ok()?);
        let fits = (0..24).contains(&hour) && (0..60).contains(&minute);
        // The fifth of January 1970 was a Monday.
        let unix_s = (4 + day as i64) * 86_400 + hour * 3600 + minute * 60;
        fits.then_some(weir_scheduler::Clock { unix_s, utc_offset_s: 0 })
    };
    parsed().ok_or_else(|| format!("`{time}` is no time; it is written as in `Mon 10:30`"))
}

impl ModelFile {
    pub(crate) fn has_room(&self) -> bool {
        self.running < self.slots
    }

    fn from_survey(model: &Value) -> ModelFile {
        let number = |name: &str| model[name].as_u64().unwrap_or(0);
        let usual = ModelFile::default();
        let rate = model["prefill_tokens_per_s"].as_f64().filter(|r| *r > 0.0).map(|r| r as f32);
        ModelFile {
            name: model["name"].as_str().unwrap_or_default().to_owned(),
            bytes: number("bytes"),
            slots: u32::try_from(number("slots")).unwrap_or(u32::MAX).max(1),
            running: u32::try_from(number("running")).unwrap_or(u32::MAX),
            prefill_tokens_per_s: rate.unwrap_or(usual.prefill_tokens_per_s),
            token_ms: model["token_ms"].as_f64().unwrap_or(usual.token_ms),
            numerics: model["numerics"].as_str().unwrap_or_default().to_owned(),
            ..usual
        }
    }
}

impl NodeFile {
    pub(crate) fn trust(&self) -> Trust {
        self.trust.as_deref().and_then(Trust::named).unwrap_or_default()
    }

    fn from_survey(node: &Value) -> NodeFile {
        let models = node["models"].as_array().map(Vec::as_slice).unwrap_or_default();
        let labels = node["labels"].as_object().into_iter().flatten();
        let guest = if node["guest"] == true { "guest" } else { "own" };
        NodeFile {
            name: node["name"].as_str().unwrap_or_default().to_owned(),
            trust: Some(node["trust"].as_str().unwrap_or(guest).to_owned()),
            labels: labels
                .filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
                .collect(),
            prompt_usd_per_mtok: node["price"]["prompt_usd_per_mtok"].as_f64().unwrap_or(0.0),
            output_usd_per_mtok: node["price"]["output_usd_per_mtok"].as_f64().unwrap_or(0.0),
            draining: node["state"] == "draining",
            models: models.iter().map(ModelFile::from_survey).collect(),
        }
    }

    /// What the scheduler's arithmetic makes of it: nobody pays a guest, whatever it asks.
    pub(crate) fn price(&self) -> Price {
        if self.trust() == Trust::Guest {
            return Price::default();
        }
        let nano = |usd_per_mtok: f64| (usd_per_mtok * 1e3).round() as u64;
        Price { prompt: nano(self.prompt_usd_per_mtok), output: nano(self.output_usd_per_mtok) }
    }

    /// As it would be described by itself.
    pub(crate) fn held(&self, model: &ModelFile) -> Held {
        let alone = duration(model.token_ms);
        Held {
            model: ModelId([0; 32]),
            name: model.name.clone(),
            text: None,
            context: model.context,
            numerics: model.numerics.clone(),
            kv: KvType::F16,
            kv_blocks: 0,
            slots: model.slots.max(1),
            rates: Rates {
                prefill_tokens_per_s: model.prefill_tokens_per_s,
                token_time_alone: alone,
                token_time_full: model.token_ms_full.map_or(alone, duration),
            },
            weights: model.bytes,
            bytes: model.bytes,
            pinned: true,
            resumes: true,
            grammars: true,
            prefixes: Vec::new(),
        }
    }

    /// What it offers a request: DESIGN's predictions, without a cache.
    pub(crate) fn offer<'a>(
        &'a self,
        id: usize,
        held: &'a Held,
        labels: &'a [(String, String)],
        running: u32,
        ask: &RequestFile,
    ) -> Offer<'a> {
        let tokens = ask.prompt_tokens.saturating_add(ask.output_tokens);
        let output = ask.expected_tokens.min(ask.max_tokens);
        let prefill_s = f64::from(tokens) / f64::from(held.rates.prefill_tokens_per_s);
        let prefill = Duration::from_secs_f64(prefill_s.min(1e6));
        let token_time = held.rates.token_time(running + 1, held.slots);
        let slower = token_time.saturating_sub(held.rates.token_time(running.max(1), held.slots));
        let ttft = prefill + token_time;
        let left = u64::from(ask.max_tokens.saturating_sub(ask.output_tokens));
        Offer {
            node: NodeId(id as u64),
            name: &self.name,
            trust: self.trust(),
            labels,
            held,
            resident: true,
            running,
            ttft,
            total: ttft + token_time.saturating_mul(output),
            price: self.price(),
            cost: self.price().of(tokens.into(), output.into()),
            worst: self.price().of(tokens.into(), left),
            late: ask.ttft_ms.is_some_and(|by| ttft > duration(by)),
            burden: (prefill + slower.saturating_mul(output / 2)).saturating_mul(running),
            same_numerics: ask.numerics.is_empty() || ask.numerics == held.numerics,
        }
    }
}
