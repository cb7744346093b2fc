//! From messages or text to token ids.
//!
//! A chat's prompt is what the model's template makes of the messages, tokenized with control tokens (`<|im_end|>`)
//! recognised, but not in what people typed ([`ChatTemplate::prompt`]). The prompt of a plain completion is the caller's
//! own, and control tokens in it are recognised, as elsewhere.
//!
//! [`ChatTemplate::prompt`]: weir_backends::text::ChatTemplate::prompt
use super::error::ApiError;
use super::request::{Prompt, Request};
use super::voice::Voice;
use serde_json::Value;
use std::iter::repeat_n;
use std::sync::Arc;
use weir_backends::text::{Listener, Special, TextError, Thoughts, Tokenizer};

/// A prompt as the model sees it.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    /// Its text, where the answer begins with it.
    pub(super) echo: Option<String>,
    /// What the answer must look like, and of which of the request's fields that was made.
    pub(super) grammar: Option<(Arc<str>, &'static str)>,
    /// Who tells its parts apart.
    pub(super) listener: Option<Listener>,
}

impl Encoded {
    fn plain(ids: Vec<u32>, echo: Option<String>) -> Encoded {
        Encoded { ids, echo, grammar: None, listener: None }
    }
}

/// A voice for each of `n` answers to each prompt.
pub(super) fn voices(prompts: &[Encoded], n: usize) -> Vec<Voice> {
    prompts.iter().flat_map(|prompt| repeat_n(Voice::new(prompt.listener.clone()), n)).collect()
}

/// Tokenizes the request's prompts, and checks what depends on the vocabulary and the context.
pub(super) fn encode(request: &mut Request) -> Result<Vec<Encoded>, ApiError> {
    let model = request.model.clone();
    let Some((tokenizer, template)) = model.text() else { return Ok(theirs(request)) };
    let vocabulary = tokenizer.len();
    if let Some((id, _)) = request.sampling.logit_bias.iter().find(|(id, _)| *id as usize >= vocabulary) {
        return Err(ApiError::field(
            "logit_bias",
            "invalid_value",
            format!("Invalid 'logit_bias': {id} isn't one of the model's {vocabulary} tokens."),
        ));
    }
    let mut encoded = Vec::with_capacity(request.prompts.len());
    for prompt in std::mem::take(&mut request.prompts) {
        let (mut grammar, mut listener) = (None, None);
        let (ids, text, param) = match prompt {
            Prompt::Messages { messages, tools, wishes } => {
                request.stop.extend(template.stops().iter().map(|s| (*s).to_owned()));
                let (messages, tools) = (Value::Array(messages), Value::Array(tools));
                let mut ids = template.prompt(tokenizer, &messages, Some(&tools)).map_err(refusal)?;
                let dialect = template.dialect();
                let thoughts = Thoughts::after(dialect, &ending(tokenizer, &ids));
                let about = if wishes.tools.is_empty() { "response_format" } else { "tools" };
                grammar = wishes.grammar(dialect, thoughts).map(|text| (text.into(), about));
                listener = wishes.listener(dialect, thoughts);
                if !request.begun.is_empty() && (grammar.is_some() || thoughts == Thoughts::Begun) {
                    return Err(ApiError::unsupported(
                        "messages",
                        "An answer whose beginning is given can't be held to a schema or to tools, nor be one that thinks first; leave the last message out.",
                    ));
                }
                ids.extend(tokenizer.encode(&request.begun, Special::AsText));
                (ids, String::new(), "messages")
            }
            Prompt::Theirs(tokens) => (vec![0; tokens.max(1) as usize], String::new(), "messages"),
            Prompt::Text(text) => (tokenizer.encode_prompt(&text, Special::Parse), text, "prompt"),
            Prompt::Ids(ids) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                    return Err(ApiError::field(
                        "prompt",
                        "invalid_value",
                        format!("Invalid 'prompt': {id} isn't one of the model's {vocabulary} tokens."),
                    ));
                }
                let text = if request.echo { tokenizer.decode(&ids) } else { String::new() };
                (ids, text, "prompt")
            }
        };
        check_length(&ids, request.model.context, param)?;
        encoded.push(Encoded { ids, echo: request.echo.then_some(text), grammar, listener });
    }
    Ok(encoded)
}

/// Prompts for an upstream: as many ids of nothing as they have tokens, about.
fn theirs(request: &mut Request) -> Vec<Encoded> {
    let most = request.model.context.saturating_sub(1).max(1);
    let one = |prompt: Prompt| {
        let tokens = if let Prompt::Theirs(tokens) = prompt { tokens.clamp(1, most) } else { 1 };
        Encoded::plain(vec![0; tokens as usize], None)
    };
    std::mem::take(&mut request.prompts).into_iter().map(one).collect()
}

/// The text that a prompt ends with.
fn ending(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.decode(&ids[ids.len().saturating_sub(16)..])
}

fn check_length(ids: &[u32], context: u32, param: &'static str) -> Result<(), ApiError> {
    if ids.is_empty() {
        return Err(ApiError::field(
            param,
            "empty_prompt",
            format!("Invalid '{param}': the prompt is empty."),
        ));
    }
    if ids.len() < context as usize {
        return Ok(());
    }
    Err(ApiError::field(
        param,
        "context_length_exceeded",
        format!(
            "This model's maximum context length is {context} tokens. However, your {param} resulted in {} tokens. Please reduce the length of the {param}.",
            ids.len()
        ),
    ))
}

fn refusal(error: TextError) -> ApiError {
    ApiError::field(
        "messages",
        "template_error",
        format!("The model's chat template can't render these messages: {error}."),
    )
}
