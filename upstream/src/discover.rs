//! What an engine of our own tells of itself: its models, and how many wait there.
use crate::catalog::Engine;
use serde_json::Value;

/// A model that an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name there.
    pub name: String,
    /// Longest prompt and output in tokens, where it says.
    pub context: Option<u32>,
}

/// How busy an engine is, whoever asked it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Requests that it works on.
    pub running: u32,
    /// Requests that wait there.
    pub waiting: u32,
}

/// Models that one engine is believed to have, at most.
const MODELS_MAX: usize = 256;
/// A name longer than this is none.
const NAME_MAX: usize = 256;

/// The models of `/v1/models`; none where it isn't such a list.
pub(crate) fn models(body: &[u8]) -> Option<Vec<Found>> {
    let list: Value = serde_json::from_slice(body).ok()?;
    let models = list.get("data")?.as_array()?.iter().filter_map(|model| {
        let name = model.get("id")?.as_str().filter(|name| !name.is_empty() && name.len() <= NAME_MAX)?;
        // vLLM's and SGLang's name for it, then llama.cpp's.
        let context =
            ["/max_model_len", "/meta/n_ctx", "/meta/n_ctx_train", "/context_length", "/context_window"];
        let context = context.iter().find_map(|at| model.pointer(at)?.as_u64());
        let context = context.and_then(|tokens| u32::try_from(tokens).ok()).filter(|tokens| *tokens >= 32);
        Some(Found { name: name.to_owned(), context })
    });
    Some(models.take(MODELS_MAX).collect())
}

/// The context of llama.cpp's `/props`.
pub(crate) fn props_context(body: &[u8]) -> Option<u32> {
    let props: Value = serde_json::from_slice(body).ok()?;
    let tokens = props.pointer("/default_generation_settings/n_ctx")?.as_u64()?;
    u32::try_from(tokens).ok().filter(|tokens| *tokens >= 32)
}

/// Where an engine says that it is well.
pub(crate) fn health_path(engine: Engine) -> Option<&'static str> {
    match engine {
        Engine::Vllm | Engine::Sglang | Engine::LlamaServer => Some("/health"),
        Engine::Ollama => Some("/api/version"),
        Engine::Any => None,
    }
}

/// Its queue, in what `/metrics` says; none where it has no such lines.
pub(crate) fn queue(engine: Engine, metrics: &str) -> Option<Queue> {
    let (running, waiting) = match engine {
        Engine::Vllm => ("vllm:num_requests_running", "vllm:num_requests_waiting"),
        Engine::Sglang => ("sglang:num_running_reqs", "sglang:num_queue_reqs"),
        Engine::LlamaServer => ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
        Engine::Any | Engine::Ollama => return None,
    };
    Some(Queue { running: gauge(metrics, running)?, waiting: gauge(metrics, waiting)? })
}

/// The sum of a gauge over its labels.
fn gauge(metrics: &str, name: &str) -> Option<u32> {
    let mut sum: Option<f64> = None;
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix(name) else { continue };
        let value = match rest.strip_prefix('{') {
            Some(labels) => labels.rsplit_once('}').map(|(_, value)| value),
            None => rest.strip_prefix(' '),
        };
        let value = value.and_then(|v| v.split_whitespace().next()?.parse::<f64>().ok());
        if let Some(value) = value.filter(|v| v.is_finite() && *v >= 0.0) {
            *sum.get_or_insert(0.0) += value;
        }
    }
    sum.map(|sum| sum as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_read_from_whatever_lists_them() {
        let list = br#"{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b","meta":{"n_ctx_train":2048}},
            {"id":""},{"id":7},{"id":"c"}]}"#;
        let found = |name: &str, context| Found { name: name.into(), context };
        let expected = vec![found("a", Some(4096)), found("b", Some(2048)), found("c", None)];
        assert_eq!(models(list), Some(expected));
        assert_eq!(models(b"<html>"), None);
        assert_eq!(models(br#"{"data":{}}"#), None);
        assert_eq!(props_context(br#"{"default_generation_settings":{"n_ctx":1024}}"#), Some(1024));
    }

    #[test]
    fn queues_are_read_from_metrics() {
        let metrics = "# HELP vllm:num_requests_waiting Number\nvllm:num_requests_running{model_name=\"a\"} 3.0\n\
            vllm:num_requests_running{model_name=\"b\"} 1.0\nvllm:num_requests_waiting{model_name=\"a}\"} 2\n\
            vllm:num_requests_waiting_total 9\nllamacpp:requests_processing 1\nllamacpp:requests_deferred NaN\n";
        assert_eq!(queue(Engine::Vllm, metrics), Some(Queue { running: 4, waiting: 2 }));
        assert_eq!(queue(Engine::LlamaServer, metrics), None);
        assert_eq!(queue(Engine::Sglang, metrics), None);
    }
}
