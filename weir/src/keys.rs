//! API keys: who may ask, for which models, by which tags, and for how much. Kept in the scheduler's state; of a secret only
//! its SHA-256 is.

mod text;

use crate::state::{State, StateError, Table};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};
pub use text::{Bound, tag};
use weir_scheduler::{Allowance, KeyId, Who};

const KEYS: Table<&str> = TableDefinition::new("keys");
/// What a secret begins with, so that people and scanners know it for one.
const MARK: &str = "sk-weir-";
/// Keys, at most; and bytes of a name.
const KEYS_MAX: usize = 10_000;
const NAME_MAX: usize = 64;
/// Longest secret that is looked at, in bytes.
const SECRET_MAX: usize = 512;

/// What is remembered of a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// What it is called; accounts and policies know it by that.
    pub name: String,
    /// What requests carry.
    pub number: u64,
    /// SHA-256 of its secret, in hexadecimal digits.
    sha256: String,
    /// Seconds since 1970.
    pub made: u64,
    /// Not from then on; in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
    /// It is good for nothing any more.
    #[serde(default)]
    pub revoked: bool,
    /// What may be spent by it, and how fast.
    #[serde(default)]
    pub limits: Vec<Bound>,
    /// The models that it may ask for, all if none: names, or beginnings of names that end in `*`.
    #[serde(default)]
    pub models: Vec<String>,
    /// Tags that all its requests get, whatever they say themselves.
    #[serde(default)]
    pub tags: Vec<(String, String)>,
}

/// A key to be made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// See [`Key::name`].
    pub name: String,
    /// For how long it is good, in seconds; for ever if none.
    #[serde(default)]
    pub expires_s: Option<u64>,
    /// See [`Key::limits`].
    #[serde(default)]
    pub limits: Vec<Bound>,
    /// See [`Key::models`].
    #[serde(default)]
    pub models: Vec<String>,
    /// See [`Key::tags`].
    #[serde(default)]
    pub tags: Vec<(String, String)>,
}

/// Why a key can't be made or revoked.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It is on no disk.
    #[error(transparent)]
    State(#[from] StateError),
    /// Such a name can't be.
    #[error("`{0}` can't be a key's name: 1 to {NAME_MAX} letters, digits and any of .-_@ can")]
    Name(String),
    /// There is one of that name.
    #[error("there is a key {0} already; revoke that first (`weir key revoke {0}`), or choose another name")]
    Twice(String),
    /// There is none of that name.
    #[error("there is no key {0}; `weir key list` lists them")]
    Unknown(String),
    /// More aren't kept.
    #[error("there are {KEYS_MAX} keys already")]
    Full,
    /// The system's randomness failed.
    #[error("the system has no randomness")]
    Random,
}

/// Why a secret opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No key has it.
    Unknown,
    /// Its time is over.
    Expired,
    /// It was revoked.
    Revoked,
}

impl Key {
    /// Whether requests with this key may go to the model of this name.
    pub fn allows(&self, model: &str) -> bool {
        let fits = |allowed: &String| match allowed.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => model.eq_ignore_ascii_case(allowed),
        };
        self.models.is_empty() || self.models.iter().any(fits)
    }

    /// Puts its tags in the place of those of the same names.
    pub fn force_tags(&self, tags: &mut Vec<(String, String)>) {
        tags.retain(|(name, _)| self.tags.iter().all(|(forced, _)| forced != name));
        // First, since not all may be kept.
        tags.splice(0..0, self.tags.iter().cloned());
    }

    /// Whether it is good for anything at that time.
    pub fn state(&self, now: SystemTime) -> Result<(), Refused> {
        match self.expires {
            _ if self.revoked => Err(Refused::Revoked),
            Some(end) if end <= seconds(now) => Err(Refused::Expired),
            _ => Ok(()),
        }
    }
}

/// All keys. What is decided is on disk before it is said.
#[derive(Debug)]
pub struct Keys {
    state: State,
    /// One is made or revoked at a time; whoever asks doesn't wait for the disk.
    changing: Mutex<()>,
    /// There are some, though perhaps none that can be read: a later program may have written them.
    some: bool,
    ring: RwLock<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    names: BTreeMap<String, Arc<Key>>,
    secrets: HashMap<String, Arc<Key>>,
}

impl Ring {
    fn put(&mut self, key: Arc<Key>) {
        if let Some(before) = self.names.insert(key.name.clone(), key.clone()) {
            self.secrets.remove(&before.sha256);
        }
        self.secrets.insert(key.sha256.clone(), key);
    }
}

impl Keys {
    /// Those of a state.
    pub fn open(state: State) -> Result<Keys, StateError> {
        let mut ring = Ring::default();
        for (_, key) in state.all(KEYS, |_| ())? {
            ring.put(Arc::new(key));
        }
        let some = state.count(KEYS)? > 0;
        Ok(Keys { state, changing: Mutex::new(()), some, ring: RwLock::new(ring) })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Ring> {
        self.ring.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, key: Arc<Key>) {
        self.ring.write().unwrap_or_else(PoisonError::into_inner).put(key);
    }

    /// Whether there never was one: then nobody is asked for any.
    pub fn is_empty(&self) -> bool {
        !self.some && self.read().names.is_empty()
    }

    /// Makes a key, and returns its secret, which is not kept. Blocks until it is on disk.
    pub fn add(&self, new: NewKey, now: SystemTime) -> Result<(Arc<Key>, String), KeyError> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b".-_@".contains(&c);
        if new.name.is_empty() || new.name.len() > NAME_MAX || !new.name.bytes().all(good) {
            return Err(KeyError::Name(new.name.chars().take(NAME_MAX).collect()));
        }
        let mut secret = [0; 32];
        let random = rustls::crypto::ring::default_provider().secure_random;
        random.fill(&mut secret).map_err(|_| KeyError::Random)?;
        let secret = format!("{MARK}{}", hex(&secret));
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = self.read();
        if ring.names.get(&new.name).is_some_and(|key| key.state(now) != Err(Refused::Revoked)) {
            return Err(KeyError::Twice(new.name));
        }
        if ring.names.len() >= KEYS_MAX && !ring.names.contains_key(&new.name) {
            return Err(KeyError::Full);
        }
        let key = Arc::new(Key {
            number: ring.names.values().map(|key| key.number).max().unwrap_or(0) + 1,
            sha256: digest(secret.as_bytes()),
            made: seconds(now),
            expires: new.expires_s.map(|after| seconds(now).saturating_add(after)),
            revoked: false,
            name: new.name,
            limits: new.limits,
            models: new.models,
            tags: new.tags,
        });
        drop(ring);
        self.state.set(KEYS, key.name.as_str(), Some(&*key))?;
        self.put(key.clone());
        Ok((key, secret))
    }

    /// A key is good for nothing from now on. Blocks until that is on disk.
    pub fn revoke(&self, name: &str) -> Result<(), KeyError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let key = self.read().names.get(name).cloned();
        let key = key.ok_or_else(|| KeyError::Unknown(name.chars().take(NAME_MAX).collect()))?;
        let revoked = Arc::new(Key { revoked: true, ..Key::clone(&key) });
        self.state.set(KEYS, name, Some(&*revoked))?;
        self.put(revoked);
        Ok(())
    }

    /// All that ever were, by name.
    pub fn list(&self) -> Vec<Arc<Key>> {
        self.read().names.values().cloned().collect()
    }

    /// The key of a secret, if it is good. Keys are looked up by their hashes, so the time that takes tells nothing.
    pub fn find(&self, secret: &[u8], now: SystemTime) -> Result<Arc<Key>, Refused> {
        if secret.len() > SECRET_MAX {
            return Err(Refused::Unknown);
        }
        let key = self.read().secrets.get(&digest(secret)).cloned().ok_or(Refused::Unknown)?;
        key.state(now).map(|()| key)
    }

    /// What the scheduler calls them.
    pub fn names(&self) -> BTreeMap<KeyId, Arc<str>> {
        self.read().names.values().map(|key| (KeyId(key.number), key.name.as_str().into())).collect()
    }

    /// What may be spent by them: by revoked ones too, of which requests may still wait.
    pub fn allowances(&self) -> Vec<Allowance> {
        let of = |key: &Arc<Key>| {
            let who = Who::Key(key.name.as_str().into());
            let each = key.limits.iter().map(move |bound| Allowance { who: who.clone(), limit: bound.0 });
            each.collect::<Vec<_>>()
        };
        self.read().names.values().flat_map(of).collect()
    }
}

fn digest(secret: &[u8]) -> String {
    hex(&Sha256::digest(secret))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_key_opens_until_it_expires_or_is_revoked_across_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(State::open(folder.path()).unwrap()).unwrap();
        assert!(keys.is_empty());
        let new = |name: &str, expires_s| NewKey { name: name.into(), expires_s, ..NewKey::default() };
        let (a, secret_a) = keys.add(new("a", Some(10)), at(100)).unwrap();
        let (b, secret_b) = keys.add(new("b", None), at(100)).unwrap();
        assert!(secret_a.len() == MARK.len() + 64 && secret_a != secret_b, "256 bits");
        assert_ne!(a.number, b.number);
        assert!(matches!(keys.add(new("a", None), at(100)), Err(KeyError::Twice(_))));
        for name in ["", "a b", "../x", "ä", &"x".repeat(65)] {
            assert!(matches!(keys.add(new(name, None), at(100)), Err(KeyError::Name(_))), "{name}");
        }
        let find = |keys: &Keys, secret: &str, second| {
            keys.find(secret.as_bytes(), at(second)).map(|k| k.name.clone())
        };
        assert_eq!(find(&keys, &secret_a, 109), Ok("a".into()));
        assert_eq!(find(&keys, &secret_a, 110), Err(Refused::Expired));
        assert_eq!(find(&keys, "sk-weir-0", 100), Err(Refused::Unknown));
        keys.revoke("b").unwrap();
        assert!(matches!(keys.revoke("c"), Err(KeyError::Unknown(_))));
        drop(keys);
        let file = std::fs::read(folder.path().join("cluster.redb")).unwrap();
        assert!(!file.windows(64).any(|w| w == &secret_a.as_bytes()[MARK.len()..]), "only hashes are kept");
        let keys = Keys::open(State::open(folder.path()).unwrap()).unwrap();
        assert_eq!(find(&keys, &secret_a, 109), Ok("a".into()));
        assert_eq!(find(&keys, &secret_b, 109), Err(Refused::Revoked));
        let (again, _) = keys.add(new("b", None), at(120)).unwrap();
        assert_eq!(find(&keys, &secret_b, 120), Err(Refused::Unknown), "its name is another's now");
        assert_eq!(again.number, 3, "no number twice");
    }

    #[test]
    fn limits_of_a_revoked_key_hold_for_what_still_waits() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(State::open(folder.path()).unwrap()).unwrap();
        let limits = vec!["5usd/day".parse().unwrap()];
        keys.add(NewKey { name: "a".into(), limits, ..NewKey::default() }, at(0)).unwrap();
        let before = keys.allowances();
        keys.revoke("a").unwrap();
        assert_eq!((before.len(), keys.allowances()), (1, before));
    }

    #[test]
    fn keys_that_cannot_be_read_are_keys_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        state.set(KEYS, "a", Some(&["of a later program"])).unwrap();
        assert!(!Keys::open(state).unwrap().is_empty());
    }

    #[test]
    fn models_and_tags_of_a_key_hold() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::open(State::open(folder.path()).unwrap()).unwrap();
        let models = vec!["small".into(), "openai/*".into()];
        let tags = vec![("team".into(), "red".into())];
        let new = NewKey { name: "a".into(), models, tags, ..NewKey::default() };
        let (key, _) = keys.add(new, at(0)).unwrap();
        assert!(key.allows("small") && key.allows("Small") && key.allows("openai/x"));
        assert!(!key.allows("smaller") && !key.allows("openai"));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut tags = vec![pair("team", "blue"), pair("user", "u"), pair("team", "green")];
        key.force_tags(&mut tags);
        assert_eq!(tags, [pair("team", "red"), pair("user", "u")]);
    }
}
