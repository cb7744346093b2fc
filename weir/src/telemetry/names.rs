//! Every name that leaves this process: of metrics, spans, events and attributes.
//!
//! `gen_ai.*` are OpenTelemetry's semantic conventions for generative AI, the newest (1.41) unless told otherwise: what
//! they renamed since 1.36 is `gen_ai.system`, and what they added isn't sent under the older ones. `weir.*` are ours.
use super::metrics::{Kind, Metric};
use serde::{Deserialize, Serialize};

/// Which conventions names follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Conventions {
    /// The newest.
    #[default]
    #[serde(rename = "newest")]
    Newest,
    /// Those of 1.36, before `gen_ai.provider.name`.
    #[serde(rename = "1.36")]
    V1_36,
    /// Both names where they differ; in metrics the newest.
    #[serde(rename = "both")]
    Both,
}

impl Conventions {
    /// By OpenTelemetry's own variable `OTEL_SEMCONV_STABILITY_OPT_IN`, a list of categories, if it says anything of ours.
    pub fn opted_in(list: &str) -> Option<Conventions> {
        list.split(',').find_map(|entry| match entry.trim() {
            "gen_ai_latest_experimental" => Some(Conventions::Newest),
            "gen_ai_latest_experimental/dup" | "gen_ai/dup" => Some(Conventions::Both),
            "gen_ai/1.36" => Some(Conventions::V1_36),
            _ => None,
        })
    }

    /// What a provider's name is called in spans.
    pub(super) fn provider(self) -> &'static [&'static str] {
        match self {
            Conventions::Newest => &[PROVIDER],
            Conventions::V1_36 => &[SYSTEM],
            Conventions::Both => &[PROVIDER, SYSTEM],
        }
    }

    /// Whether what is newer than 1.36 is sent.
    pub(super) fn is_new(self) -> bool {
        self != Conventions::V1_36
    }
}

/// What a request asks for, in the conventions' words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operation {
    /// `chat`: the next turn of a conversation, by whichever API.
    #[default]
    Chat,
    /// `text_completion`: text goes on.
    TextCompletion,
    /// `embeddings`.
    Embeddings,
}

impl Operation {
    /// Its well-known name.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::TextCompletion => "text_completion",
            Operation::Embeddings => "embeddings",
        }
    }
}

/// The conventions' name of a provider, where they have one for it; else its own here.
pub(super) fn provider(name: &str) -> &str {
    match name {
        "azure" => "azure.ai.openai",
        "bedrock" => "aws.bedrock",
        "google" | "gemini" => "gcp.gemini",
        "mistral" => "mistral_ai",
        "xai" => "x_ai",
        other => other,
    }
}

/// Why requests end without an answer.
pub(super) const ERRORS: [&str; 9] =
    ["invalid", "no_model", "busy", "deadline", "cancelled", "internal", "upstream", "budget", "rate"];
/// Whoever of ours answers.
pub(super) const OURS: &str = "weir";
/// A label's value where there are too many different ones.
pub(super) const OTHER: &str = "_OTHER";

// Spans, beside `METHOD ROUTE` of the gateway and `OPERATION MODEL` of an attempt.
pub(super) const SPAN_SCHEDULE: &str = "weir.schedule";
pub(super) const SPAN_NODE: &str = "weir.node";
pub(super) const SPAN_PREFILL: &str = "weir.prefill";
pub(super) const SPAN_DECODE: &str = "weir.decode";

// What the scheduler decides, as events of its span.
pub(super) const PLACED: &str = "weir.placed";
pub(super) const RESUMED: &str = "weir.resumed";
pub(super) const HEDGED: &str = "weir.hedged";
pub(super) const SPILLED: &str = "weir.spilled";
pub(super) const REFUSED: &str = "weir.refused";
pub(super) const ATTEMPT_FAILED: &str = "weir.attempt_failed";
pub(super) const ATTEMPT_LEFT: &str = "weir.attempt_left";

// Attributes. Those of `gen_ai` stand on attempts alone: whoever adds usage up over a trace counts nothing twice.
pub(super) const OPERATION: &str = "gen_ai.operation.name";
pub(super) const PROVIDER: &str = "gen_ai.provider.name";
pub(super) const SYSTEM: &str = "gen_ai.system";
pub(super) const REQUEST_MODEL: &str = "gen_ai.request.model";
pub(super) const RESPONSE_MODEL: &str = "gen_ai.response.model";
pub(super) const MAX_TOKENS: &str = "gen_ai.request.max_tokens";
pub(super) const TEMPERATURE: &str = "gen_ai.request.temperature";
pub(super) const TOP_P: &str = "gen_ai.request.top_p";
pub(super) const TOP_K: &str = "gen_ai.request.top_k";
pub(super) const FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
pub(super) const FIRST_CHUNK: &str = "gen_ai.response.time_to_first_chunk";
pub(super) const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
pub(super) const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
pub(super) const CACHED_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
pub(super) const TOKEN_TYPE: &str = "gen_ai.token.type";
pub(super) const ERROR: &str = "error.type";
pub(super) const SERVER_ADDRESS: &str = "server.address";
pub(super) const SERVER_PORT: &str = "server.port";
pub(super) const METHOD: &str = "http.request.method";
pub(super) const ROUTE: &str = "http.route";
pub(super) const STATUS: &str = "http.response.status_code";
pub(super) const MODEL: &str = "weir.model";
pub(super) const ANSWERS: &str = "weir.answers";
pub(super) const STREAM: &str = "weir.stream";
pub(super) const TO_FIRST: &str = "weir.time_to_first_token";
pub(super) const TOKENS_MADE: &str = "weir.tokens.made";
pub(super) const NODE: &str = "weir.node.name";
pub(super) const DEVICE: &str = "weir.device";
pub(super) const ATTEMPT: &str = "weir.attempt";
pub(super) const GIVEN: &str = "weir.tokens.given";
pub(super) const PRIORITY: &str = "weir.priority";
pub(super) const COST: &str = "weir.cost_usd";
pub(super) const ATTEMPTS: &str = "weir.attempts";
pub(super) const BESIDE: &str = "weir.beside";
pub(super) const NUMERICS: &str = "weir.numerics";

// Labels of metrics of ours, beside the conventions'.
pub(super) const L_NODE: &str = "node";
pub(super) const L_MODEL: &str = "model";
pub(super) const L_KIND: &str = "kind";
pub(super) const L_TRUST: &str = "trust";
pub(super) const L_DEVICE: &str = "device";
pub(super) const L_PROVIDER: &str = "provider";
pub(super) const L_ROUTE: &str = "route";
pub(super) const L_STATUS: &str = "status";

/// Boundaries that the conventions give for durations of calls, in seconds.
const CALLS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// For the time to the first token.
const FIRST: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// For the time of a token.
const PACE: &[f64] = &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// For numbers of tokens.
const TOKENS: &[f64] = &[
    1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0,
    16777216.0, 67108864.0,
];

macro_rules! metrics {
    ($($id:ident = $name:literal, $unit:literal, $kind:expr, $help:literal;)*) => {
        $(pub(super) static $id: Metric = Metric { name: $name, unit: $unit, kind: $kind, help: $help };)*
        /// All of them.
        #[cfg(test)]
        pub(super) static ALL: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    SERVER_DURATION = "gen_ai.server.request.duration", "s", Kind::Histogram(CALLS), "From a request's arrival to the last byte of its answer.";
    SERVER_FIRST = "gen_ai.server.time_to_first_token", "s", Kind::Histogram(FIRST), "From a request's arrival to its first token, where it succeeded.";
    SERVER_PACE = "gen_ai.server.time_per_output_token", "s", Kind::Histogram(PACE), "Between tokens after the first, where it succeeded.";
    CLIENT_DURATION = "gen_ai.client.operation.duration", "s", Kind::Histogram(CALLS), "Attempts at requests, of nodes of ours (provider weir) and of providers.";
    CLIENT_TOKENS = "gen_ai.client.token.usage", "{token}", Kind::Histogram(TOKENS), "Tokens of attempts that ended well: what went in, what came out.";
    ACTIVE = "weir.requests.active", "{request}", Kind::Gauge, "Requests for tokens that the gateway is answering.";
    RESPONSES = "weir.responses", "{response}", Kind::Counter, "Answers to requests for tokens, by HTTP status; one that a client left has status 499.";
    QUEUE_WAITING = "weir.queue.waiting", "{request}", Kind::Gauge, "Requests that wait for a node.";
    QUEUE_RUNNING = "weir.queue.running", "{request}", Kind::Gauge, "Requests that nodes work on.";
    QUEUE_HEDGED = "weir.queue.hedged", "{request}", Kind::Gauge, "Requests that two nodes work on.";
    QUEUE_SATURATION = "weir.queue.saturation", "1", Kind::Gauge, "Requests running and waiting, over the sequences that all nodes of ours run at once.";
    PLACEMENTS = "weir.placements", "{attempt}", Kind::Counter, "Requests given to a node: placed, resumed after another, hedged, or spilled to a provider.";
    FAILOVERS = "weir.failovers", "{attempt}", Kind::Counter, "Attempts that a node failed, by what became known of it.";
    HEDGES = "weir.hedges", "{attempt}", Kind::Counter, "Requests that a second node raced for.";
    REFUSALS = "weir.refusals", "{request}", Kind::Counter, "Requests that ended without an answer, by why.";
    SPENT = "weir.provider.cost", "USD", Kind::Counter, "What attempts cost, in dollars.";
    NODES = "weir.nodes", "{node}", Kind::Gauge, "Nodes connected, providers' models included.";
    NODE_UP = "weir.node.up", "1", Kind::Gauge, "1 while the node is connected, has said something lately and isn't drained.";
    NODE_SILENT = "weir.node.silent", "s", Kind::Gauge, "How long the node has said nothing.";
    NODE_DRAINING = "weir.node.draining", "1", Kind::Gauge, "1 while it gets nothing new.";
    NODE_RESTS = "weir.node.rests", "s", Kind::Gauge, "How long its breaker leaves it alone yet; 0 where it is closed.";
    NODE_MEMORY = "weir.node.memory.free", "By", Kind::Gauge, "Memory that further models may take.";
    NODE_BANDWIDTH = "weir.node.bandwidth", "By/s", Kind::Gauge, "Memory that its devices read in a second, as measured.";
    NODE_SHARE = "weir.node.bandwidth.share", "1", Kind::Gauge, "Weights read a second over that bandwidth, while it decodes.";
    NODE_TOKENS = "weir.node.tokens", "{token}", Kind::Counter, "Tokens that came from the node.";
    NODE_RUNNING = "weir.node.running", "{request}", Kind::Gauge, "Requests of ours that run there.";
    NODE_SLOTS = "weir.node.slots", "{sequence}", Kind::Gauge, "Sequences that run there at once, at most.";
    NODE_TOKEN_TIME = "weir.node.token.time", "s", Kind::Gauge, "From one token to the next there, with as many sequences as run now.";
    NODE_PREFILL = "weir.node.prefill.rate", "{token}/s", Kind::Gauge, "Prompt tokens a second there.";
    NODE_KV = "weir.node.kv.blocks", "{block}", Kind::Gauge, "Blocks of its KV cache.";
    NODE_KV_USED = "weir.node.kv.use", "1", Kind::Gauge, "Share of those that are in use.";
    NODE_ALIVE = "weir.node.model.alive", "1", Kind::Gauge, "1 while the model's engine works.";
    ENGINE_TOKENS = "weir.engine.tokens", "{token}", Kind::Counter, "Tokens sampled by an engine of this process.";
    ENGINE_PROMPT = "weir.engine.prompt.tokens", "{token}", Kind::Counter, "Prompt tokens computed by it.";
    ENGINE_STEPS = "weir.engine.steps", "{step}", Kind::Counter, "Steps of it.";
    ENGINE_GUESSED = "weir.engine.guessed.tokens", "{token}", Kind::Counter, "Tokens that were guessed and checked.";
    ENGINE_RIGHT = "weir.engine.guessed.right", "{token}", Kind::Counter, "Guessed tokens that were right.";
    ENGINE_RUNNING = "weir.engine.running", "{sequence}", Kind::Gauge, "Sequences in its slots.";
    ENGINE_QUEUED = "weir.engine.queued", "{sequence}", Kind::Gauge, "Sequences that wait for a slot or for KV blocks.";
    ENGINE_KV_USED = "weir.engine.kv.use", "1", Kind::Gauge, "Share of its KV blocks in use.";
    POWER = "weir.power", "W", Kind::Gauge, "Power drawn, where this machine's sensors can be read.";
    ENERGY = "weir.energy", "J", Kind::Counter, "Energy drawn, where this machine's counters can be read.";
    DROPPED = "weir.telemetry.dropped", "{item}", Kind::Counter, "Spans and metrics that were dropped because the collector did not take them.";
    PROCESS_CPU = "process.cpu", "s", Kind::Counter, "Processor time of this process.";
    PROCESS_MEMORY = "process.resident_memory", "By", Kind::Gauge, "Resident memory of this process.";
    PROCESS_START = "process.start_time", "s", Kind::Gauge, "When this process began, in seconds since 1970.";
    BUILD = "weir.build.info", "", Kind::Gauge, "1; the label is the program's version.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_once() {
        let mut names: Vec<&str> = ALL.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert!(ALL.iter().all(|metric| metric.help.ends_with('.') || metric.help.contains(';')));
    }

    #[test]
    fn conventions_are_chosen_as_others_do() {
        let check = |list, expected| assert_eq!(Conventions::opted_in(list), expected, "{list}");
        check("", None);
        check("http, database/dup", None);
        check("http,gen_ai_latest_experimental", Some(Conventions::Newest));
        check("gen_ai/dup", Some(Conventions::Both));
        check("gen_ai/1.36", Some(Conventions::V1_36));
    }
}
