//! From messages or text to token ids.
//!
//! A chat's prompt is what the model's template makes of the messages, tokenized with control tokens (`<|im_end|>`)
//! recognised. What people typed must not contain any: names of control tokens in messages and tools are kept apart
//! before rendering ([`Guard`]) and tokenized as ordinary text, so that no message can end its turn and begin another.
//! The prompt of a plain completion is the caller's own, and control tokens in it are recognised, as elsewhere.
use super::Shared;
use super::error::ApiError;
use super::guard::Guard;
use super::request::{Prompt, Request};
use crate::driver::ServedModel;
use serde_json::Value;
use std::sync::Arc;
use weir_backends::text::{ChatTemplate, Special, TextError, Tokenizer};

/// A prompt as the model sees it.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    /// Its text, where the answer begins with it.
    pub(super) echo: Option<String>,
}

/// Tokenizes the request's prompts, and checks what depends on the vocabulary and the context.
pub(super) fn encode(shared: &Shared, request: &mut Request) -> Result<Vec<Encoded>, ApiError> {
    let tokenizer = request.model.tokenizer.clone();
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
        let (ids, text, param) = match prompt {
            Prompt::Messages { messages, tools } => {
                let wording = shared.wording(&request.model);
                request.stop.extend(wording.template.stops().iter().map(|s| (*s).to_owned()));
                (wording.chat(&tokenizer, messages, tools)?, String::new(), "messages")
            }
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
        encoded.push(Encoded { ids, echo: request.echo.then_some(text) });
    }
    Ok(encoded)
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

/// How one model is talked to.
pub(super) struct Wording {
    guard: Guard,
    template: Arc<ChatTemplate>,
}

impl Wording {
    /// The file's template, or the plain one for models without.
    pub(super) fn new(model: &ServedModel) -> Wording {
        let fallback = || Arc::new(ChatTemplate::fallback(&model.tokenizer));
        let template = model.template.clone().unwrap_or_else(fallback);
        Wording { guard: Guard::new(&model.tokenizer), template }
    }

    fn chat(
        &self,
        tokenizer: &Tokenizer,
        messages: Vec<Value>,
        tools: Vec<Value>,
    ) -> Result<Vec<u32>, ApiError> {
        let mut messages = Value::Array(messages);
        let mut tools = Value::Array(tools);
        let is_marked = self.guard.mark(&mut messages) | self.guard.mark(&mut tools);
        let text = self.template.render(&messages, Some(&tools), true).map_err(refusal)?;
        if !is_marked {
            return Ok(tokenizer.encode_prompt(&text, Special::Parse));
        }
        let pieces = self.guard.pieces(&text).into_iter();
        let mut ids: Vec<u32> = pieces.flat_map(|(text, special)| tokenizer.encode(text, special)).collect();
        if let Some(bos) = tokenizer.bos().filter(|bos| tokenizer.adds_bos() && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }
}

fn refusal(error: TextError) -> ApiError {
    ApiError::field(
        "messages",
        "template_error",
        format!("The model's chat template can't render these messages: {error}."),
    )
}
