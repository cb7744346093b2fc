//! From JSON to checked values: what a chat or a completion request asks for.
mod chat;
mod completion;
mod options;
mod sampling;
mod wishes;

use super::error::ApiError;
use super::fields::Fields;
use super::responses::{self, Asked, Owner};
use super::{Limits, Shared, embeddings, messages};
use crate::driver::{Conversation, ServedModel, Words};
use crate::telemetry::Operation;
use options::{WeirOptions, weir_options};
pub(super) use sampling::choice_seed;
use serde_json::{Map, Value};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use weir_backends::text::Wishes;
use weir_scheduler::{ModelId, Priority, Sampling};

/// Fields that only we, or servers like us, know; they mean the same in every API.
pub(super) const OURS: [&str; 8] = [
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "ignore_eos",
    "weir",
];

/// Which API a request came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
    /// Anthropic's `/v1/messages`.
    Messages,
    /// The same, whose tokens are only counted.
    CountTokens,
    /// `/v1/responses`.
    Responses,
    /// `/v1/embeddings`.
    Embeddings,
}

impl Api {
    /// What telemetry calls it.
    pub(super) fn operation(self) -> Operation {
        match self {
            Api::Chat | Api::Messages | Api::CountTokens | Api::Responses => Operation::Chat,
            Api::Completion => Operation::TextCompletion,
            Api::Embeddings => Operation::Embeddings,
        }
    }

    /// Its path.
    pub(super) fn route(self) -> &'static str {
        match self {
            Api::Chat => "/v1/chat/completions",
            Api::Completion => "/v1/completions",
            Api::Messages => "/v1/messages",
            Api::CountTokens => "/v1/messages/count_tokens",
            Api::Responses => "/v1/responses",
            Api::Embeddings => "/v1/embeddings",
        }
    }
}

/// A request of any API as what all have in common: a chat, or a plain completion, in OpenAI's form.
pub(super) struct Translated {
    pub(super) fields: Fields,
    /// As it came, where some upstream may speak the same.
    pub(super) native: Option<Map<String, Value>>,
    /// The text with which the answer of a chat begins, and which isn't said again.
    pub(super) begun: String,
    /// What the Responses API's answer wants to know.
    pub(super) asked: Option<Arc<Asked>>,
}

impl Translated {
    /// With nothing special.
    pub(super) fn of(fields: Fields) -> Translated {
        Translated { fields, native: None, begun: String::new(), asked: None }
    }
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
    /// The text with which the answer of a chat begins, and which isn't said again.
    pub(super) begun: String,
    /// What the Responses API's answer wants to know.
    pub(super) asked: Option<Arc<Asked>>,
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
    /// For the model's template: an array of message objects and one of tools; and what the answer must look like.
    Messages { messages: Vec<Value>, tools: Vec<Value>, wishes: Box<Wishes> },
    /// Text as it is.
    Text(String),
    /// Token ids, not yet compared with the vocabulary.
    Ids(Vec<u32>),
}

impl Request {
    /// A request for `chosen`, or for the model that it names.
    pub(super) fn parse(
        api: Api,
        body: &[u8],
        shared: &Shared,
        chosen: Option<Arc<ServedModel>>,
        owner: Owner,
    ) -> Result<Request, ApiError> {
        let fields = Fields::parse(body)?;
        let translated = match api {
            Api::Chat | Api::Completion => Translated::of(fields),
            Api::Messages => messages::read(fields, false)?,
            Api::CountTokens => messages::read(fields, true)?,
            Api::Embeddings => embeddings::read(fields)?,
            Api::Responses => responses::read(fields, &shared.responses, owner)?,
        };
        let Translated { mut fields, native, begun, asked } = translated;
        let named = fields.string("model")?;
        // Of the chat that it is.
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
            match api {
                Api::Completion => completion::refuse_unsupported(&mut fields)?,
                Api::Embeddings => return Err(embeddings::refused(&model.name)),
                _ => chat::refuse_unsupported(&mut fields)?,
            }
        }
        let ours = match api {
            Api::Completion | Api::Embeddings => completion::prompts(&mut fields),
            _ => chat::prompt(&mut fields).map(|prompt| vec![prompt]),
        };
        let n = fields.integer("n", 1..=16)?.unwrap_or(1) as usize;
        check_choices(ours.as_ref().map_or(1, Vec::len), n, &shared.limits)?;
        let sent = copy.map(|fields| Sent { fields, native, begun: begun.clone(), seeded });
        let (prompts, conversations) = told(api, theirs, ours, sent)?;
        let echo = api == Api::Completion && fields.boolean("echo")?.unwrap_or(false);
        let sampling = sampling::sampling(api, &mut fields)?;
        if echo && sampling.logprobs.is_some() {
            return Err(ApiError::unsupported(
                "echo",
                "'echo' with 'logprobs' isn't supported: log-probabilities of the prompt are not computed.",
            ));
        }
        let max_tokens = sampling::max_tokens(api, &mut fields)?;
        let stop = sampling::stop(api, &mut fields)?;
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
        // Embeddings of different models have nothing in common.
        otherwise.retain(|other| *other != model.id && api != Api::Embeddings);
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
            begun,
            asked,
            priority,
            tags,
            ttft,
            max_cost,
            otherwise,
            conversations,
        })
    }
}

/// What a client sent, kept for upstreams and other models.
struct Sent {
    fields: Map<String, Value>,
    native: Option<Map<String, Value>>,
    begun: String,
    seeded: bool,
}

/// Prompts as the model's own nodes want them, or as an upstream's counts of tokens; and each with what its client sent,
/// where there is a copy of that.
fn told(
    api: Api,
    theirs: bool,
    ours: Result<Vec<Prompt>, ApiError>,
    sent: Option<Sent>,
) -> Result<(Vec<Prompt>, Vec<Arc<Conversation>>), ApiError> {
    let Some(Sent { fields: mut copy, mut native, begun, seeded }) = sent else {
        return Ok((ours?, Vec::new()));
    };
    if api == Api::Embeddings {
        let fields = native.unwrap_or_default();
        let prompt = Prompt::Theirs(weir_upstream::estimate_tokens(&fields));
        let api = weir_upstream::Api::Embedding;
        let conversation = Conversation { api, fields, native: None, begun, words: None, seeded };
        return Ok((vec![prompt], vec![Arc::new(conversation)]));
    }
    let is_chat = api != Api::Completion;
    let form = if is_chat { weir_upstream::Api::Chat } else { weir_upstream::Api::Completion };
    copy.remove("weir");
    if !is_chat {
        // Each gets its own, in place of all.
        copy.remove("prompt");
    }
    if api != Api::Chat {
        forget_reasoning(&mut copy);
    }
    let ours = match ours {
        // An upstream may know what we don't.
        Err(_) if theirs && is_chat && copy.get("messages").is_some_and(|m| !is_empty_list(m)) => {
            vec![Prompt::Theirs(0)]
        }
        ours => ours?,
    };
    let (mut prompts, mut conversations) = (Vec::with_capacity(ours.len()), Vec::with_capacity(ours.len()));
    for prompt in ours {
        let mut fields = copy.clone();
        let words = match &prompt {
            Prompt::Messages { messages, tools, .. } => {
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
        let (native, begun) = (native.take(), begun.clone());
        conversations.push(Arc::new(Conversation { api: form, fields, native, begun, words, seeded }));
    }
    Ok((prompts, conversations))
}

/// OpenAI's API takes no earlier thoughts; templates of our own models may.
fn forget_reasoning(fields: &mut Map<String, Value>) {
    let messages = fields.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten();
    messages.filter_map(Value::as_object_mut).for_each(|message| _ = message.remove("reasoning_content"));
}

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_none_or(Vec::is_empty)
}

/// 64 random bits: a seed where the client gave none, or part of a name. Not for secrets.
pub(super) fn draw() -> u64 {
    // Each `RandomState` has other keys, themselves from the system's randomness.
    RandomState::new().hash_one(0u8)
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

pub(super) fn missing(param: impl Into<String>) -> ApiError {
    let param = param.into();
    let message = format!("Missing required parameter: '{param}'.");
    ApiError::field(param, "missing_required_parameter", message)
}
