//! Machines that ask to be let in without a join link, until their owner has compared codes.
use std::time::{Duration, Instant};
use weir_transport::PublicKey;

/// That many may ask at once: a person looks at each.
const ASKING_MAX: usize = 16;
/// Nobody waits longer.
const PATIENCE: Duration = Duration::from_secs(300);

/// A machine that asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its key.
    pub key: PublicKey,
    /// What it calls itself.
    pub name: String,
    /// What it must have on its screen, too.
    pub code: String,
    /// It becomes a guest.
    pub guest: bool,
    since: Instant,
}

/// Those who ask now.
#[derive(Debug, Default)]
pub(super) struct Asking(Vec<Asker>);

impl Asking {
    /// The code by which this machine is known while it asks; none if too many do. It stays the same when the machine
    /// comes again by another link.
    pub fn ask(&mut self, key: PublicKey, name: String, guest: bool, code: String) -> Option<String> {
        self.forget();
        if let Some(known) = self.0.iter().find(|asker| asker.key == key) {
            return Some(known.code.clone());
        }
        if self.0.len() >= ASKING_MAX {
            return None;
        }
        self.0.push(Asker { key, name, code: code.clone(), guest, since: Instant::now() });
        Some(code)
    }

    /// All of them.
    pub fn all(&mut self) -> Vec<Asker> {
        self.forget();
        self.0.clone()
    }

    /// Takes out the one with this code, however it is typed.
    pub fn take(&mut self, code: &str) -> Option<Asker> {
        self.forget();
        let plain = |code: &str| code.replace('-', "").trim().to_ascii_uppercase();
        let at = self.0.iter().position(|asker| plain(&asker.code) == plain(code))?;
        Some(self.0.remove(at))
    }

    fn forget(&mut self) {
        self.0.retain(|asker| asker.since.elapsed() < PATIENCE);
    }
}
