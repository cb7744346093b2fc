//! API keys: who may ask, for which models, by which tags, and for how much. Kept in the scheduler's state; of a secret only
//! its SHA-256 is.

mod text;

use crate::etcd::{Etcd, EtcdError, Op};
use crate::state::{KeptError, State, Table};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};
pub use text::{Bound, tag};
use weir_scheduler::{Allowance, KeyId, Who};

const KEYS: Table<&str> = TableDefinition::new("keys");
/// What begins their names in etcd, and where the highest number is there.
const SHARED: &str = "shared/keys/";
const NUMBERS: &str = "shared/key-numbers";
/// Times that a transaction is tried which others were quicker than.
const TRIES: u32 = 20;
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
    /// It can't be kept.
    #[error(transparent)]
    Kept(#[from] KeptError),
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
    /// With whom they are shared: then none is in the state.
    etcd: Option<Etcd>,
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
    pub fn open(state: State) -> Result<Keys, KeptError> {
        let mut ring = Ring::default();
        for (_, key) in state.all(KEYS, |_| ())? {
            ring.put(Arc::new(key));
        }
        let some = state.count(KEYS)? > 0;
        Ok(Keys { state, etcd: None, changing: Mutex::new(()), some, ring: RwLock::new(ring) })
    }

    /// Those that schedulers share. The first that does brings those of its state along. Blocks.
    pub fn open_shared(state: State, etcd: Etcd) -> Result<Keys, KeptError> {
        for (_, key) in state.all::<_, Key, _>(KEYS, |_| ())? {
            let name = format!("{SHARED}{}", key.name);
            for _ in 0..TRIES {
                let found = etcd.transact(&[], &[Op::Get(name.clone()), Op::Get(NUMBERS.into())], &[])?.found;
                if found.first().is_some_and(Option::is_some) {
                    break;
                }
                let counted = found.into_iter().nth(1).flatten();
                let last: u64 =
                    counted.as_ref().and_then(|c| serde_json::from_slice(&c.value).ok()).unwrap_or(0);
                // Another scheduler's key may have its number.
                let key = Key { number: last + 1, ..key.clone() };
                let when = [(name.as_str(), 0), (NUMBERS, counted.map_or(0, |c| c.revision))];
                if etcd.transact(&when, &[put(&name, &key), put(NUMBERS, &key.number)], &[])?.succeeded {
                    break;
                }
            }
        }
        let found = etcd.list(SHARED, 0)?.0;
        let some = !found.is_empty();
        let ring = RwLock::new(Ring::default());
        let keys = Keys { state, etcd: Some(etcd), changing: Mutex::new(()), some, ring };
        found.iter().for_each(|found| _ = keys.learn(&found.key, &found.value));
        Ok(keys)
    }

    /// An entry of what is shared has changed. Says whether it is a key.
    pub fn learn(&self, entry: &str, value: &[u8]) -> bool {
        let Some(name) = entry.strip_prefix(SHARED) else { return false };
        match serde_json::from_slice::<Key>(value) {
            Ok(key) if key.name == name => self.put(Arc::new(key)),
            Ok(_) => tracing::warn!("{entry} in etcd is another key's"),
            Err(error) => tracing::warn!("{entry} in etcd can't be read: {error}"),
        }
        true
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

    /// Whether other schedulers have them, too.
    pub fn is_shared(&self) -> bool {
        self.etcd.is_some()
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
        let key = Key {
            number: 0,
            sha256: digest(secret.as_bytes()),
            made: seconds(now),
            expires: new.expires_s.map(|after| seconds(now).saturating_add(after)),
            revoked: false,
            name: new.name,
            limits: new.limits,
            models: new.models,
            tags: new.tags,
        };
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let ring = self.read();
            if ring.names.len() >= KEYS_MAX && !ring.names.contains_key(&key.name) {
                return Err(KeyError::Full);
            }
        }
        let key = Arc::new(match &self.etcd {
            Some(etcd) => self.add_shared(etcd, key, now)?,
            None => {
                let ring = self.read();
                free(ring.names.get(&key.name).map(|key| &**key), &key.name, now)?;
                let number = ring.names.values().map(|key| key.number).max().unwrap_or(0) + 1;
                drop(ring);
                let key = Key { number, ..key };
                self.state.set(KEYS, key.name.as_str(), Some(&key)).map_err(KeptError::from)?;
                key
            }
        });
        self.put(key.clone());
        Ok((key, secret))
    }

    /// No number twice, whichever scheduler makes a key.
    fn add_shared(&self, etcd: &Etcd, key: Key, now: SystemTime) -> Result<Key, KeyError> {
        let kept = |error: EtcdError| KeyError::Kept(error.into());
        let name = format!("{SHARED}{}", key.name);
        for _ in 0..TRIES {
            let looks = [Op::Get(name.clone()), Op::Get(NUMBERS.into())];
            let found = etcd.transact(&[], &looks, &[]).map_err(kept)?.found;
            let at = |n: usize| found.get(n).cloned().flatten();
            let there: Option<Key> = at(0).and_then(|found| serde_json::from_slice(&found.value).ok());
            free(there.as_ref(), &key.name, now)?;
            let last: u64 = at(1).and_then(|found| serde_json::from_slice(&found.value).ok()).unwrap_or(0);
            let known = self.read().names.values().map(|key| key.number).max().unwrap_or(0);
            let key = Key { number: last.max(known) + 1, ..key.clone() };
            let puts = [put(&name, &key), put(NUMBERS, &key.number)];
            let revision = |n: usize| at(n).map_or(0, |found| found.revision);
            let when = [(name.as_str(), revision(0)), (NUMBERS, revision(1))];
            if etcd.transact(&when, &puts, &[]).map_err(kept)?.succeeded {
                return Ok(key);
            }
        }
        Err(kept(EtcdError::Away("others make keys all the time".into())))
    }

    /// A key is good for nothing from now on. Blocks until that is on disk.
    pub fn revoke(&self, name: &str) -> Result<(), KeyError> {
        let unknown = || KeyError::Unknown(name.chars().take(NAME_MAX).collect());
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(etcd) = &self.etcd else {
            let key = self.read().names.get(name).cloned().ok_or_else(unknown)?;
            let revoked = Arc::new(Key { revoked: true, ..Key::clone(&key) });
            self.state.set(KEYS, name, Some(&*revoked)).map_err(KeptError::from)?;
            self.put(revoked);
            return Ok(());
        };
        let kept = |error: EtcdError| KeyError::Kept(error.into());
        let entry = format!("{SHARED}{name}");
        for _ in 0..TRIES {
            let found = etcd.get(&entry).map_err(kept)?.ok_or_else(unknown)?;
            let key: Key = serde_json::from_slice(&found.value).map_err(|_| unknown())?;
            let revoked = Key { revoked: true, ..key };
            let when = [(entry.as_str(), found.revision)];
            if etcd.transact(&when, &[put(&entry, &revoked)], &[]).map_err(kept)?.succeeded {
                self.put(Arc::new(revoked));
                return Ok(());
            }
        }
        Err(kept(EtcdError::Away("others change keys all the time".into())))
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

/// Whether a name can be had: there is no key of that name, or a revoked one.
fn free(there: Option<&Key>, name: &str, now: SystemTime) -> Result<(), KeyError> {
    match there.is_some_and(|key| key.state(now) != Err(Refused::Revoked)) {
        true => Err(KeyError::Twice(name.to_owned())),
        false => Ok(()),
    }
}

fn put<T: Serialize>(key: &str, value: &T) -> Op {
    let value = serde_json::to_vec(value).expect("strings and numbers always serialise");
    Op::Put { key: key.to_owned(), value, lease: None }
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
    fn schedulers_that_come_together_bring_their_keys_and_no_number_is_there_twice() {
        let Some(server) = weir_tests::EtcdServer::start() else { return };
        let config = crate::etcd::EtcdConfig {
            endpoints: vec![server.url()],
            prefix: "/weir/".into(),
            user: None,
            ca: None,
        };
        let etcd = Etcd::new(&config).unwrap();
        let new = |name: &str| NewKey { name: name.into(), ..NewKey::default() };
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let states = folders.each_ref().map(|folder| State::open(folder.path()).unwrap());
        for (state, name) in states.iter().zip(["a", "b"]) {
            Keys::open(state.clone()).unwrap().add(new(name), at(0)).unwrap();
        }
        let [one, two] = states.map(|state| Keys::open_shared(state, etcd.clone()).unwrap());
        one.add(new("c"), at(0)).unwrap();
        let (_, secret) = two.add(new("d"), at(0)).unwrap();
        assert!(
            matches!(two.add(new("c"), at(0)), Err(KeyError::Twice(_))),
            "though it has not heard of it yet"
        );
        let mut numbers = Vec::new();
        for found in etcd.list(SHARED, 0).unwrap().0 {
            assert!(one.learn(&found.key, &found.value));
            numbers.push(serde_json::from_slice::<Key>(&found.value).unwrap().number);
        }
        numbers.sort_unstable();
        assert_eq!(numbers, [1, 2, 3, 4]);
        assert_eq!(one.find(secret.as_bytes(), at(1)).unwrap().name, "d");
        one.revoke("d").unwrap();
        assert!(two.add(new("d"), at(2)).is_ok(), "a revoked key's name can be had again");
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
