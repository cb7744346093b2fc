//! From JSON to checked values: what a chat or a completion request asks for.
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::{Limits, Shared};
use crate::driver::{Conversation, ServedModel, Words};
use serde_json::{Map, Value};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use weir_scheduler::{Class, ModelId, Priority, Sampling};

/// Which of the two APIs a request came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// A request with nothing left to check but its length in tokens.
pub(super) struct Request {
    pub(super) api: Api,
    pub(super) model: Arc<ServedModel>,
    /// At least one; one for a chat.
    pub(super) prompts: Vec<Prompt>,
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) sampling: Sampling,
    /// As much as fits where none.
    pub(super) max_tokens: Option<u32>,
    pub(super) stop: Vec<String>,
    pub(super) ignore_eos: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// The text begins with the prompt.
    pub(super) echo: bool,
    pub(super) priority: Priority,
    pub(super) tags: Vec<(String, String)>,
    /// The first token must come within this.
    pub(super) ttft: Option<Duration>,
    /// Billionths of a dollar.
    pub(super) max_cost: Option<u64>,
    /// Models that will do as well.
    pub(super) otherwise: Vec<ModelId>,
    /// One for each prompt, where somebody may want to know more than its token ids; else none.
    pub(super) conversations: Vec<Arc<Conversation>>,
}

/// What is to be continued.
#[derive(Clone)]
pub(super) enum Prompt {
    /// For an upstream, which knows best how many tokens it is; about so many.
    Theirs(u32),
    /// For the model's template: an array of message objects and one of tools.
    Messages { messages: Vec<Value>, tools: Vec<Value> },
    /// Text as it is.
    Text(String),
    /// Token ids, not yet compared with the vocabulary.
    Ids(Vec<u32>),
}

/// Most tokens of a legacy completion whose request doesn't say.
const COMPLETION_TOKENS: u32 = 16;

impl Request {
    /// A request for `chosen`, or for the model that it names.
    pub(super) fn parse(
        api: Api,
        body: &[u8],
        shared: &Shared,
        chosen: Option<Arc<ServedModel>>,
    ) -> Result<Request, ApiError> {
        let mut fields = Fields::parse(body)?;
        let named = fields.string("model")?;
        let copy = (shared.driver.may_reword() || fields.has("weir")).then(|| fields.copy());
        let seeded = fields.has("seed");
        let options = weir_options(&mut fields)?;
        let model = match (chosen, options.class) {
            (Some(chosen), _) => chosen,
            // Which one that is, the scheduler knows.
            (None, Some(_)) => return Err(ApiError::no_model(named.as_deref(), &[])),
            (None, None) => super::models::find(shared, named.as_deref())?,
        };
        let theirs = model.text().is_none();
        if !theirs {
            refuse_unsupported(api, &mut fields)?;
        }
        let ours = match api {
            Api::Chat => chat_prompt(&mut fields).map(|prompt| vec![prompt]),
            Api::Completion => completion_prompts(&mut fields),
        };
        let (prompts, conversations) = told(api, theirs, ours, copy, seeded)?;
        let n = fields.integer("n", 1..=16)?.unwrap_or(1) as usize;
        check_choices(prompts.len(), n, &shared.limits)?;
        let echo = api == Api::Completion && fields.boolean("echo")?.unwrap_or(false);
        let sampling = sampling(api, &mut fields)?;
        if echo && sampling.logprobs.is_some() {
            return Err(ApiError::unsupported(
                "echo",
                "'echo' with 'logprobs' isn't supported: log-probabilities of the prompt are not computed.",
            ));
        }
        let max_tokens = max_tokens(api, &mut fields)?;
        let stop = stop(&mut fields)?;
        let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = include_usage(&mut fields, stream)?;
        let WeirOptions { priority, tags, ttft, max_cost, otherwise, class: _ } = options;
        let other = |name: &String| super::models::find(shared, Some(name)).map(|model| model.id);
        let otherwise = otherwise.iter().map(other).collect::<Result<Vec<_>, _>>();
        let mut otherwise = otherwise.map_err(|error| error.within("weir.otherwise"))?;
        // The policy's come last, and those that aren't here don't count.
        let stand_ins = shared.driver.stand_ins(&model.name);
        otherwise.extend(stand_ins.iter().filter_map(|name| other(name).ok()));
        otherwise.retain(|other| *other != model.id);
        Ok(Request {
            api,
            model,
            prompts,
            n,
            sampling,
            max_tokens,
            stop,
            ignore_eos,
            stream,
            include_usage,
            echo,
            priority,
            tags,
            ttft,
            max_cost,
            otherwise,
            conversations,
        })
    }
}

/// Prompts as the model's own nodes want them, or as an upstream's counts of tokens; and each with what its client sent,
/// where there is a copy of that.
fn told(
    api: Api,
    theirs: bool,
    ours: Result<Vec<Prompt>, ApiError>,
    copy: Option<Map<String, Value>>,
    seeded: bool,
) -> Result<(Vec<Prompt>, Vec<Arc<Conversation>>), ApiError> {
    let Some(mut copy) = copy else { return Ok((ours?, Vec::new())) };
    let form = match api {
        Api::Chat => weir_upstream::Api::Chat,
        Api::Completion => weir_upstream::Api::Completion,
    };
    copy.remove("weir");
    let ours = match ours {
        // An upstream may know what we don't.
        Err(_) if theirs && api == Api::Chat && copy.get("messages").is_some_and(|m| !is_empty_list(m)) => {
            vec![Prompt::Theirs(0)]
        }
        ours => ours?,
    };
    let (mut prompts, mut conversations) = (Vec::with_capacity(ours.len()), Vec::with_capacity(ours.len()));
    for prompt in ours {
        let mut fields = copy.clone();
        let words = match &prompt {
            Prompt::Messages { messages, tools } => {
                let (messages, tools) = (Value::Array(messages.clone()), Value::Array(tools.clone()));
                Some(Words::Messages { messages, tools })
            }
            Prompt::Text(text) => {
                fields.insert("prompt".into(), text.as_str().into());
                Some(Words::Text(text.clone()))
            }
            Prompt::Ids(ids) => {
                fields.insert("prompt".into(), ids.as_slice().into());
                None
            }
            Prompt::Theirs(_) => None,
        };
        prompts.push(if theirs { Prompt::Theirs(weir_upstream::estimate_tokens(&fields)) } else { prompt });
        conversations.push(Arc::new(Conversation { api: form, fields, words, seeded }));
    }
    Ok((prompts, conversations))
}

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_none_or(Vec::is_empty)
}

/// 64 random bits: a seed where the client gave none, or part of a name. Not for secrets.
pub(super) fn draw() -> u64 {
    // Each `RandomState` has other keys, themselves from the system's randomness.
    RandomState::new().hash_one(0u8)
}

/// What would change the answer and can't be done is refused; what is unknown is ignored.
fn refuse_unsupported(api: Api, fields: &mut Fields) -> Result<(), ApiError> {
    match api {
        Api::Chat => {
            if let Some(format) = fields.object("response_format")? {
                let map = format.into_map();
                if map.get("type").and_then(Value::as_str) != Some("text") {
                    return Err(ApiError::unsupported(
                        "response_format",
                        "Only response_format {\"type\": \"text\"} is supported by this server.",
                    ));
                }
            }
            if let Some(modalities) = fields.take("modalities")
                && modalities != serde_json::json!(["text"])
            {
                return Err(ApiError::unsupported(
                    "modalities",
                    "Only the modality \"text\" is supported by this server.",
                ));
            }
        }
        Api::Completion => {
            if fields.take("suffix").is_some() {
                return Err(ApiError::unsupported("suffix", "'suffix' isn't supported by this server."));
            }
            if fields.integer("best_of", 1..=20)?.unwrap_or(1) > 1 {
                return Err(ApiError::unsupported(
                    "best_of",
                    "'best_of' above 1 isn't supported by this server: use 'n'.",
                ));
            }
        }
    }
    Ok(())
}

fn check_choices(prompts: usize, n: usize, limits: &Limits) -> Result<(), ApiError> {
    if prompts * n > limits.choices_max {
        return Err(ApiError::field(
            if prompts > 1 { "prompt" } else { "n" },
            "too_many_choices",
            format!(
                "{prompts} prompts with n = {n} make more than the {} choices that one request may have.",
                limits.choices_max
            ),
        ));
    }
    Ok(())
}

fn chat_prompt(fields: &mut Fields) -> Result<Prompt, ApiError> {
    let messages = fields.array("messages")?.ok_or_else(|| missing("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::field(
            "messages",
            "empty_array",
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ));
    }
    let messages =
        messages.into_iter().enumerate().map(|(i, m)| message(i, m)).collect::<Result<Vec<_>, _>>()?;
    let mut tools = fields.array("tools")?.unwrap_or_default();
    if let Some(other) = tools.iter().find(|t| !t.is_object()) {
        return Err(wrong_type("tools", "an array of objects", other));
    }
    match fields.take("tool_choice") {
        None => {}
        Some(Value::String(choice)) if choice == "auto" => {}
        Some(Value::String(choice)) if choice == "none" => tools.clear(),
        Some(_) => {
            return Err(ApiError::unsupported(
                "tool_choice",
                "Only tool_choice \"auto\" and \"none\" are supported by this server.",
            ));
        }
    }
    Ok(Prompt::Messages { messages, tools })
}

/// A message as templates expect it: text parts joined, no content as empty, `developer` as `system`.
fn message(index: usize, value: Value) -> Result<Value, ApiError> {
    let Value::Object(mut map) = value else {
        return Err(wrong_type(format!("messages[{index}]"), "an object", &value));
    };
    let role = match map.get("role").and_then(Value::as_str) {
        Some("developer") => "system".to_owned(),
        Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role.to_owned(),
        _ => {
            return Err(ApiError::field(
                format!("messages[{index}].role"),
                "invalid_value",
                format!(
                    "Invalid 'messages[{index}].role': expected one of 'system', 'developer', 'user', 'assistant', 'tool', 'function'."
                ),
            ));
        }
    };
    let content = match map.remove("content") {
        Some(Value::String(text)) => Value::String(text),
        Some(Value::Array(parts)) => Value::String(joined_parts(index, parts)?),
        None | Some(Value::Null) if role == "assistant" => Value::String(String::new()),
        Some(other) => {
            return Err(wrong_type(format!("messages[{index}].content"), "a string or an array", &other));
        }
        None => return Err(missing(format!("messages[{index}].content"))),
    };
    map.insert("role".into(), Value::String(role));
    map.insert("content".into(), content);
    Ok(Value::Object(map))
}

fn joined_parts(index: usize, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for part in &parts {
        let text = match part.get("type").and_then(Value::as_str) {
            Some("text") => part.get("text").and_then(Value::as_str),
            Some("refusal") => part.get("refusal").and_then(Value::as_str),
            _ => None,
        };
        texts.push(text.ok_or_else(|| {
            ApiError::field(
                format!("messages[{index}].content"),
                "unsupported_content",
                "Only parts of type 'text' are supported by this server.",
            )
        })?);
    }
    Ok(texts.join("\n"))
}

fn completion_prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let value = fields.take("prompt").ok_or_else(|| missing("prompt"))?;
    let kind = "a string, an array of strings, an array of token ids, or an array of those";
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    let one = |v: Value| match v {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => match ids.iter().map(id).collect() {
            Some(ids) => Ok(Prompt::Ids(ids)),
            None => Err(wrong_type("prompt", kind, &Value::Array(ids))),
        },
        other => Err(wrong_type("prompt", kind, &other)),
    };
    match value {
        Value::Array(items) if items.is_empty() => {
            Err(ApiError::field("prompt", "empty_array", "Invalid 'prompt': empty array."))
        }
        Value::Array(items) if items.iter().any(Value::is_number) => Ok(vec![one(Value::Array(items))?]),
        Value::Array(items) => items.into_iter().map(one).collect(),
        single => Ok(vec![one(single)?]),
    }
}

fn sampling(api: Api, fields: &mut Fields) -> Result<Sampling, ApiError> {
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=100.0)?.unwrap_or(1.0);
    if repetition_penalty < f32::MIN_POSITIVE {
        return Err(ApiError::field(
            "repetition_penalty",
            "decimal_below_min_value",
            "Invalid 'repetition_penalty': it must be above 0; 1 is off.",
        ));
    }
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        // -1 is how some write "all".
        top_k: fields.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0) as u32,
        // 0 means the likeliest token alone.
        top_p: top_p.max(f32::MIN_POSITIVE),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        seed: seed(fields)?.unwrap_or_else(draw),
        logit_bias: logit_bias(fields)?,
        logprobs: logprobs(api, fields)?,
    })
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    // A negative seed is as good as any other.
    let seed = value.as_u64().or_else(|| value.as_i64().map(|n| n as u64));
    seed.map(Some).ok_or_else(|| wrong_type("seed", "an integer", &value))
}

/// The seed of the `choice`th answer to one prompt; the first has the request's own.
pub(super) fn choice_seed(seed: u64, choice: usize) -> u64 {
    // SplitMix64's increment and finaliser, so that neighbours have nothing in common.
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add((choice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let map = map.into_map();
    let bad = |what: String| {
        ApiError::field("logit_bias", "invalid_value", format!("Invalid 'logit_bias': {what}."))
    };
    if map.len() > 1024 {
        return Err(bad(format!("{} entries, at most 1024 are taken", map.len())));
    }
    map.into_iter()
        .map(|(key, value)| {
            let id = key.parse().map_err(|_| bad("keys must be token ids".into()))?;
            let bias = value.as_f64().filter(|b| (-100.0..=100.0).contains(b));
            bias.map(|b| (id, b as f32))
                .ok_or_else(|| bad(format!("the bias of {id} must be a number in -100..=100")))
        })
        .collect()
}

fn logprobs(api: Api, fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    if api == Api::Completion {
        return Ok(fields.integer("logprobs", 0..=20)?.map(|n| n as u8));
    }
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=20)?;
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(ApiError::field(
            "top_logprobs",
            "invalid_value",
            "Invalid 'top_logprobs': it is only allowed when 'logprobs' is true.",
        ));
    }
    Ok(wanted.then(|| top.unwrap_or(0) as u8))
}

fn max_tokens(api: Api, fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let range = 1..=i64::from(u32::MAX);
    let old = fields.integer("max_tokens", range.clone())?;
    let new = if api == Api::Chat { fields.integer("max_completion_tokens", range)? } else { None };
    let asked = new.or(old).map(|n| n as u32);
    Ok(match api {
        Api::Chat => asked,
        Api::Completion => Some(asked.unwrap_or(COMPLETION_TOKENS)),
    })
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let strings = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(s)) => vec![s],
        Some(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(s) => Ok(s),
                other => Err(wrong_type("stop", "a string or an array of strings", &other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", &other)),
    };
    let bad = |what: &str| ApiError::field("stop", "invalid_value", format!("Invalid 'stop': {what}."));
    match &strings {
        s if s.len() > 4 => Err(bad("at most 4 strings are taken")),
        s if s.iter().any(String::is_empty) => Err(bad("a stop string can't be empty")),
        s if s.iter().any(|s| s.len() > 1024) => Err(bad("a stop string can't be longer than 1024 bytes")),
        _ => Ok(strings),
    }
}

fn include_usage(fields: &mut Fields, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        return Err(ApiError::field(
            "stream_options",
            "invalid_value",
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
        ));
    }
    Ok(options.boolean("include_usage")?.unwrap_or(false))
}

/// The `weir` object: who goes first, labels that policies look at, how long the first token may take, what all may cost, and
/// a class of models that counts instead of the model that is named: many programs can only name one.
#[derive(Default)]
struct WeirOptions {
    priority: Priority,
    tags: Vec<(String, String)>,
    ttft: Option<Duration>,
    /// Billionths of a dollar.
    max_cost: Option<u64>,
    class: Option<Class>,
    /// Names of models.
    otherwise: Vec<String>,
}

/// Models that a request may name beside its own.
const OTHERWISE_MAX: usize = 8;

fn weir_options(fields: &mut Fields) -> Result<WeirOptions, ApiError> {
    let Some(mut options) = fields.object("weir")? else { return Ok(WeirOptions::default()) };
    let within = |error: ApiError| error.within("weir");
    let priority = match options.string("priority").map_err(within)?.as_deref() {
        None | Some("normal") => Priority::Normal,
        Some("interactive") => Priority::Interactive,
        Some("background") => Priority::Background,
        Some(_) => {
            return Err(ApiError::field(
                "weir.priority",
                "invalid_value",
                "Invalid 'weir.priority': expected 'interactive', 'normal' or 'background'.",
            ));
        }
    };
    let tags = options.object("tags").map_err(within)?.map(Fields::into_map).unwrap_or_default();
    let bad =
        |what: &str| ApiError::field("weir.tags", "invalid_value", format!("Invalid 'weir.tags': {what}."));
    if tags.len() > 32 {
        return Err(bad("at most 32 are taken"));
    }
    let tags = tags
        .into_iter()
        .map(|(name, value)| match value {
            Value::String(v) if name.len() <= 64 && v.len() <= 256 => Ok((name, v)),
            _ => Err(bad("names up to 64 bytes, values strings up to 256 bytes")),
        })
        .collect::<Result<_, _>>()?;
    let ttft = options.integer("ttft_ms", 1..=86_400_000).map_err(within)?;
    let max_usd = options.number("max_usd", 0.0..=1e6).map_err(within)?;
    let class = match options.string("model_size").map_err(within)? {
        None => None,
        Some(name) => Some(Class::named(&name).ok_or_else(|| {
            let message = "Invalid 'weir.model_size': expected 'small', 'medium', 'large' or 'auto'.";
            ApiError::field("weir.model_size", "invalid_value", message)
        })?),
    };
    let mut otherwise = Vec::new();
    for name in options.array("otherwise").map_err(within)?.unwrap_or_default() {
        match name {
            Value::String(name) if otherwise.len() < OTHERWISE_MAX => otherwise.push(name),
            _ => {
                let message =
                    format!("Invalid 'weir.otherwise': expected at most {OTHERWISE_MAX} names of models.");
                return Err(ApiError::field("weir.otherwise", "invalid_value", message));
            }
        }
    }
    Ok(WeirOptions {
        priority,
        tags,
        ttft: ttft.map(|ms| Duration::from_millis(ms as u64)),
        max_cost: max_usd.map(|usd| (f64::from(usd) * 1e9).round() as u64),
        class,
        otherwise,
    })
}

fn missing(param: impl Into<String>) -> ApiError {
    let param = param.into();
    let message = format!("Missing required parameter: '{param}'.");
    ApiError::field(param, "missing_required_parameter", message)
}
