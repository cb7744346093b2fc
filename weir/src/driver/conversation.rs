//! A request as its client made it, kept beside its token ids: upstreams want messages, and other models other tokens.
use super::{Course, ServedModel};
use serde_json::{Map, Value};
use std::sync::Arc;
use weir_backends::text::Special;
use weir_scheduler::Generate;
use weir_upstream::Api;

/// A request as its client made it.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// In which form it came.
    pub api: Api,
    /// Its fields, unknown ones included.
    pub fields: Map<String, Value>,
    /// The request in Anthropic's form, where it came in that: for upstreams that speak it.
    pub native: Option<Map<String, Value>>,
    /// The text with which the answer of a chat begins: its client has it.
    pub begun: String,
    /// What it says, as models of our own want it; none where they can't be told.
    pub words: Option<Words>,
    /// The client gave a seed: then upstreams get one, too.
    pub seeded: bool,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub enum Words {
    /// For a model's template: an array of message objects and one of tools.
    Messages {
        /// The messages.
        messages: Value,
        /// The tools.
        tools: Value,
    },
    /// Text as it is.
    Text(String),
}

/// What an attempt at a request needs beside its token ids.
pub(super) struct Talk {
    pub conversation: Arc<Conversation>,
    /// What the client has of the answer.
    pub so_far: String,
    pub course: Course,
}

impl Talk {
    /// Puts the prompt and the answer so far in the words of another model. Returns by how much positions differ: what the
    /// node calls position `p` is `p + shift`, wrapping.
    pub fn reword(&self, model: &ServedModel, ask: &mut Generate) -> Result<u32, String> {
        if self.course.has_more_than_text() {
            return Err("what came so far is more than text, and no node can go on with that".into());
        }
        let Some((tokenizer, template)) = model.text() else {
            return Err(format!("{} hands out no tokenizer", model.name));
        };
        let prompt = match &self.conversation.words {
            Some(Words::Messages { messages, tools }) => {
                if ask.grammar.is_some() && tools.as_array().is_some_and(|tools| !tools.is_empty()) {
                    // The grammar says how calls look, and another family's look otherwise.
                    return Err(format!("{} is told of tools in another way", model.name));
                }
                ask.stop.extend(template.stops().iter().map(|stop| (*stop).to_owned()));
                let prompt = template.prompt(tokenizer, messages, Some(tools));
                let mut prompt = prompt.map_err(|e| e.to_string())?;
                prompt.extend(tokenizer.encode(&self.conversation.begun, Special::AsText));
                prompt
            }
            Some(Words::Text(text)) => tokenizer.encode_prompt(text, Special::Parse),
            None => return Err(format!("{} can't be asked for this", model.name)),
        };
        let output = tokenizer.encode(&self.so_far, Special::AsText);
        let (before, now) = (ask.output.len() as u32, output.len() as u32);
        let left = ask.max_tokens.saturating_sub(before);
        // Some of another vocabulary's tokens.
        ask.sampling.logit_bias.clear();
        (ask.prompt, ask.output, ask.max_tokens) = (prompt, output, now.saturating_add(left));
        Ok(before.wrapping_sub(now))
    }
}
