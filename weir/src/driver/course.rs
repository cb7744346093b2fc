//! What is known of a request's course beside its events: where it ran, what it cost, and what isn't text.
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Positions of one request that may have more than text, at most.
const EXTRAS_MAX: usize = 1 << 16;

/// Shared by whoever carries a request and whoever reads its events.
#[derive(Clone, Debug, Default)]
pub(super) struct Course(Arc<Mutex<Inside>>);

#[derive(Debug, Default)]
struct Inside {
    nodes: Vec<Arc<str>>,
    cost: Cost,
    /// By position, until they are taken.
    extras: BTreeMap<u32, Extra>,
    more_than_text: bool,
    finish: Option<String>,
}

/// What a request cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Billionths of a dollar.
    pub nano_usd: u64,
    /// Some of it by our own count: a provider did not report its own.
    pub estimated: bool,
}

/// What an upstream said at one position beside text, in OpenAI's form.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extra {
    /// Fields of the delta: `tool_calls`, `reasoning_content`, ...
    pub rest: Map<String, Value>,
    /// `logprobs` of the choice.
    pub logprobs: Option<Value>,
}

impl Course {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node takes part.
    pub fn joined(&self, name: Arc<str>) {
        self.inside().nodes.push(name);
    }

    pub fn nodes(&self) -> Vec<Arc<str>> {
        self.inside().nodes.clone()
    }

    /// An attempt cost so much.
    pub fn spent(&self, nano_usd: u64) {
        let mut inside = self.inside();
        inside.cost.nano_usd = inside.cost.nano_usd.saturating_add(nano_usd);
    }

    /// Some of what it costs is an estimate.
    pub fn estimates(&self) {
        self.inside().cost.estimated = true;
    }

    pub fn cost(&self) -> Cost {
        self.inside().cost
    }

    /// What comes with the text at a position.
    pub fn put(&self, position: u32, extra: Extra) {
        let mut inside = self.inside();
        inside.more_than_text |= !extra.rest.is_empty();
        if inside.extras.len() < EXTRAS_MAX {
            inside.extras.insert(position, extra);
        }
    }

    /// An attempt goes on from a position: what an earlier one said from there on has not been heard.
    pub fn begin(&self, position: u32) {
        self.inside().extras.split_off(&position);
    }

    pub fn take(&self, position: u32) -> Option<Extra> {
        self.inside().extras.remove(&position)
    }

    /// Whether there was anything that a text doesn't have.
    pub fn has_more_than_text(&self) -> bool {
        self.inside().more_than_text
    }

    /// The provider's own word for why it ended.
    pub fn finished(&self, word: String) {
        self.inside().finish = Some(word);
    }

    pub fn finish(&self) -> Option<String> {
        self.inside().finish.clone()
    }
}
