//! The parts of what a model of our own says: its text, its thoughts and its calls.
use super::parts::Part;
use super::request::draw;
use serde_json::Map;
use weir_backends::text::{Heard, Listener};

/// Of one choice. Text goes through unchanged where there is nothing to listen for.
#[derive(Clone, Debug, Default)]
pub(super) struct Voice {
    listener: Option<Listener>,
    /// Calls so far.
    calls: u32,
}

impl Voice {
    pub(super) fn new(listener: Option<Listener>) -> Voice {
        Voice { listener, calls: 0 }
    }

    /// More text.
    pub(super) fn say(&mut self, text: String) -> Vec<Part> {
        let heard = match &mut self.listener {
            None if text.is_empty() => Vec::new(),
            None => return vec![Part::Text(text)],
            Some(listener) => listener.push(&text),
        };
        self.parts(heard)
    }

    /// What was held back: nothing more comes of our own models.
    pub(super) fn end(&mut self) -> Vec<Part> {
        let heard = self.listener.as_mut().map(Listener::finish).unwrap_or_default();
        self.parts(heard)
    }

    fn parts(&mut self, heard: Vec<Heard>) -> Vec<Part> {
        let part = |heard| match heard {
            Heard::Text(text) => Part::Text(text),
            Heard::Thought(text) => Part::Reasoning(text),
            Heard::Call(name) => {
                self.calls += 1;
                let id = format!("call_{:016x}", draw());
                Part::CallBegin { index: self.calls - 1, id, name, more: Map::new() }
            }
            Heard::Arguments(json) => Part::CallArguments { index: self.calls.saturating_sub(1), json },
        };
        heard.into_iter().map(part).collect()
    }
}
