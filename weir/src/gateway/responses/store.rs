//! Answers that are kept, so that a request can go on with one by its name. They are kept in the memory of this process, and
//! the least lately used are forgotten when there are too many: a client that wants to be sure sends the conversation itself.
use crate::gateway::error::ApiError;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of all that is kept, and of one answer with its request.
const BYTES_MAX: usize = 64 << 20;
const ENTRY_BYTES_MAX: usize = BYTES_MAX / 4;
/// Answers that are kept.
const ENTRIES_MAX: usize = 10_000;

/// Whose an answer is: the hash of the key with which it was asked for. Nobody else finds it.
pub(in crate::gateway) type Owner = [u8; 32];

/// The answers of all.
#[derive(Default)]
pub(in crate::gateway) struct Store(Mutex<Inside>);

#[derive(Default)]
struct Inside {
    entries: HashMap<String, Entry>,
    /// By when they were used last.
    order: BTreeMap<u64, String>,
    uses: u64,
    bytes: usize,
}

/// An answer, and what it answers.
pub(super) struct Entry {
    pub owner: Owner,
    /// With what the conversation began.
    pub previous: Option<String>,
    /// The items that were asked and answered.
    pub items: Vec<Value>,
    /// The response object.
    pub response: Value,
    used: u64,
    bytes: usize,
}

impl Entry {
    pub fn new(owner: Owner, previous: Option<String>, items: Vec<Value>, response: Value) -> Entry {
        let bytes = items.iter().chain([&response]).map(weight).sum();
        Entry { owner, previous, items, response, used: 0, bytes }
    }
}

impl Store {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn put(&self, id: &str, mut entry: Entry) {
        if entry.bytes > ENTRY_BYTES_MAX {
            return;
        }
        let mut inside = self.inside();
        inside.remove(id);
        while inside.bytes + entry.bytes > BYTES_MAX || inside.entries.len() >= ENTRIES_MAX {
            let Some((_, oldest)) = inside.order.pop_first() else { break };
            inside.remove(&oldest);
        }
        inside.uses += 1;
        entry.used = inside.uses;
        inside.bytes += entry.bytes;
        inside.order.insert(entry.used, id.to_owned());
        inside.entries.insert(id.to_owned(), entry);
    }

    /// All items of a conversation up to an answer, oldest first.
    pub(super) fn conversation(&self, owner: Owner, id: &str) -> Result<Vec<Value>, ApiError> {
        let mut inside = self.inside();
        let (mut turns, mut next) = (Vec::new(), Some(id.to_owned()));
        while let Some(id) = next {
            // An answer can't come before itself, so this ends.
            let entry = inside.touch(owner, &id).ok_or_else(|| gone(&id, turns.is_empty()))?;
            turns.push(entry.items.clone());
            next = entry.previous.clone();
        }
        Ok(turns.into_iter().rev().flatten().collect())
    }

    /// The response object of an answer.
    pub(super) fn get(&self, owner: Owner, id: &str) -> Option<Value> {
        self.inside().touch(owner, id).map(|entry| entry.response.clone())
    }

    /// Forgets an answer; says whether it was there.
    pub(super) fn forget(&self, owner: Owner, id: &str) -> bool {
        let mut inside = self.inside();
        let is_here = inside.entries.get(id).is_some_and(|entry| entry.owner == owner);
        if is_here {
            inside.remove(id);
        }
        is_here
    }
}

impl Inside {
    fn remove(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            self.bytes -= entry.bytes;
            self.order.remove(&entry.used);
        }
    }

    /// Finds an answer, which has been used now.
    fn touch(&mut self, owner: Owner, id: &str) -> Option<&Entry> {
        let entry = self.entries.get_mut(id).filter(|entry| entry.owner == owner)?;
        self.uses += 1;
        self.order.remove(&entry.used);
        entry.used = self.uses;
        self.order.insert(self.uses, id.to_owned());
        Some(entry)
    }
}

fn gone(id: &str, is_last: bool) -> ApiError {
    let id: String = id.chars().take(100).collect();
    let which = if is_last { "" } else { ", an earlier one of this conversation," };
    let message = format!(
        "Previous response with id '{id}'{which} not found: answers are kept in this server's memory until it restarts or needs the room. Send the whole conversation as 'input' instead."
    );
    ApiError::field("previous_response_id", "previous_response_not_found", message)
}

/// About how many bytes a value takes.
fn weight(value: &Value) -> usize {
    let own = size_of::<Value>();
    own + match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(weight).sum(),
        Value::Object(map) => map.iter().map(|(name, value)| 2 * own + name.len() + weight(value)).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Owner = [1; 32];

    fn entry(previous: Option<&str>, text: &str) -> Entry {
        Entry::new(ME, previous.map(str::to_owned), vec![text.into()], Value::Null)
    }

    #[test]
    fn conversations_are_put_together_for_their_owner_alone() {
        let store = Store::default();
        store.put("a", entry(None, "1"));
        store.put("b", entry(Some("a"), "2"));
        assert_eq!(store.conversation(ME, "b").unwrap(), ["1", "2"]);
        assert!(store.conversation([2; 32], "b").is_err() && store.get([2; 32], "b").is_none());
        assert!(!store.forget([2; 32], "a") && store.forget(ME, "a") && !store.forget(ME, "a"));
        let error = store.conversation(ME, "b").unwrap_err();
        assert!(error.message().contains("'a', an earlier one"), "{error:?}");
    }

    #[test]
    fn what_is_used_least_is_forgotten_first() {
        let store = Store::default();
        let long = "x".repeat(ENTRY_BYTES_MAX / 2);
        let names: Vec<String> = (0..9).map(|n| n.to_string()).collect();
        for name in &names {
            store.put(name, entry(None, &long));
            // The first stays in use.
            assert!(store.get(ME, "0").is_some());
        }
        let kept: Vec<&String> = names.iter().filter(|name| store.get(ME, name).is_some()).collect();
        assert_eq!(kept, ["0", "3", "4", "5", "6", "7", "8"].iter().collect::<Vec<_>>());
        assert!(store.inside().bytes <= BYTES_MAX);
        store.put("huge", entry(None, &"x".repeat(ENTRY_BYTES_MAX)));
        assert!(store.get(ME, "huge").is_none() && store.get(ME, "0").is_some());
    }
}
