//! Schedulers that share a cluster through etcd: each says where it is, and hears what the others decide.
//!
//! A thread asks twice a second for what has changed since it asked last, by a range with a least revision: one call, with
//! nothing to keep open or to begin anew after compaction, and what it costs etcd is small beside a transaction. Where a
//! scheduler is hangs on a lease: who dies is gone from the list within ten seconds. While etcd is away the last list
//! and all that is known hold.
use crate::books::Sharing;
use crate::cluster::{Changed, Cluster, Schedulers};
use crate::driver::Driver;
use crate::etcd::{Etcd, EtcdConfig, EtcdError, Op};
use crate::keys::Keys;
use crate::state::{KeptError, State};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use weir_transport::Replica;

const SHARED: &str = "shared/";
const REPLICAS: &str = "replicas/";
/// How often changes are asked for.
const LOOK: Duration = Duration::from_millis(500);
/// How long a scheduler that says nothing is still thought to be there, and how often it says something.
const LEASE_S: u64 = 10;
const RENEW: Duration = Duration::from_secs(2);
/// Schedulers that are heeded, at most.
const REPLICAS_MAX: usize = 64;
/// How long etcd may take to answer when a scheduler starts.
const PATIENCE: Duration = Duration::from_secs(30);

/// This scheduler's place among those that share a cluster.
#[derive(Clone, Debug)]
pub struct Replicas {
    etcd: Etcd,
    id: String,
    /// Schedulers that are there now.
    count: Arc<AtomicUsize>,
}

/// What a scheduler says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    /// Where nodes reach it: `HOST:PORT`.
    addresses: Vec<String>,
    /// Where its gateway listens, for a person.
    #[serde(default)]
    http: String,
}

/// What is to be kept in step with the other schedulers.
pub struct Followed {
    /// Who belongs to the cluster; none where nodes can't join here.
    pub cluster: Option<Arc<Cluster>>,
    /// API keys.
    pub keys: Arc<Keys>,
    /// Whom it concerns.
    pub driver: Driver,
    /// Where nodes reach this scheduler: `HOST:PORT`.
    pub addresses: Vec<String>,
    /// Where its gateway listens.
    pub http: String,
}

/// Says that a scheduler is there, until it is dropped.
pub struct Presence {
    ended: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panicked, and that was said.
            _ = thread.join();
        }
    }
}

impl Replicas {
    /// A place for the scheduler with this state. Waits a while for an etcd that doesn't answer yet. Blocks.
    pub fn open(config: &EtcdConfig, state: &State) -> Result<Replicas, KeptError> {
        let etcd = Etcd::new(config)?;
        let id = state.replica()?;
        let began = Instant::now();
        loop {
            match etcd.get("shared/identity") {
                Ok(_) => break,
                Err(error @ EtcdError::Away(_)) if began.elapsed() < PATIENCE => {
                    tracing::warn!("{error}; trying again");
                    std::thread::sleep(LOOK);
                }
                Err(error) => return Err(error.into()),
            }
        }
        // Two, until it is known: then too little is leased rather than too much.
        Ok(Replicas { etcd, id, count: Arc::new(AtomicUsize::new(2)) })
    }

    /// Where it all is.
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// How accounts are shared.
    pub fn sharing(&self) -> Sharing {
        Sharing { etcd: self.etcd.clone(), replica: self.id.clone(), replicas: self.count.clone() }
    }

    /// What this scheduler is called, before it is known who else there is.
    pub fn alone(&self) -> Schedulers {
        Schedulers { own: Some(self.id.clone()), all: Vec::new() }
    }

    /// Says where this scheduler is, and follows what others decide, until the result is dropped. Must be called within a
    /// tokio runtime.
    pub fn follow(self, followed: Followed) -> Result<Presence, EtcdError> {
        let runtime = Handle::current();
        let follower = Follower { replicas: self, followed, seen: 0, lease: None, renewed: None };
        let ended = Arc::new(AtomicBool::new(false));
        let over = ended.clone();
        let failed = |error: std::io::Error| EtcdError::Config(error.to_string());
        let thread = std::thread::Builder::new().name("weir-replicas".into());
        let thread = thread.spawn(move || follower.run(&runtime, &over)).map_err(failed)?;
        Ok(Presence { ended, thread: Some(thread) })
    }
}

struct Follower {
    replicas: Replicas,
    followed: Followed,
    /// Entries changed before this have been seen.
    seen: i64,
    /// On which our entry hangs, and when it was renewed last.
    lease: Option<i64>,
    renewed: Option<Instant>,
}

impl Follower {
    fn run(mut self, runtime: &Handle, over: &AtomicBool) {
        let mut was_away = false;
        while !over.load(Ordering::Relaxed) {
            let looked = self.announce().and_then(|()| self.look(runtime));
            if let Err(error) = &looked
                && !was_away
            {
                tracing::warn!("{error}; what the other schedulers decide is heard of later");
            }
            was_away = looked.is_err();
            std::thread::park_timeout(LOOK);
        }
        if let Some(lease) = self.lease {
            // It runs out by itself.
            _ = self.replicas.etcd.let_go(lease);
        }
    }

    /// Says that we are there, if it is time.
    fn announce(&mut self) -> Result<(), EtcdError> {
        if self.renewed.is_some_and(|at| at.elapsed() < RENEW) {
            return Ok(());
        }
        let etcd = &self.replicas.etcd;
        if let Some(lease) = self.lease {
            if etcd.keep_alive(lease)? {
                self.renewed = Some(Instant::now());
                return Ok(());
            }
            self.lease = None;
        }
        let lease = etcd.grant(LEASE_S)?;
        let Followed { addresses, http, .. } = &self.followed;
        let said = Said { addresses: addresses.clone(), http: http.clone() };
        let value = serde_json::to_vec(&said).expect("strings always serialise");
        let put = Op::Put { key: format!("{REPLICAS}{}", self.replicas.id), value, lease: Some(lease) };
        etcd.transact(&[], &[put], &[])?;
        (self.lease, self.renewed) = (Some(lease), Some(Instant::now()));
        Ok(())
    }

    /// Takes in what has changed.
    fn look(&mut self, runtime: &Handle) -> Result<(), EtcdError> {
        let since = self.seen + 1;
        let (changed, at) = self.replicas.etcd.list(SHARED, since)?;
        let Followed { cluster, keys, driver, .. } = &self.followed;
        let mut has_keys = false;
        for entry in &changed {
            if keys.learn(&entry.key, &entry.value) {
                has_keys = true;
            } else if let Some((node, what)) =
                cluster.as_ref().and_then(|c| c.learn(&entry.key, &entry.value))
            {
                match what {
                    Changed::Revoked => runtime.block_on(driver.expel(node, "the node was revoked")),
                    Changed::Drained(on) => runtime.block_on(driver.drain(node, on)),
                }
            }
        }
        if has_keys {
            runtime.block_on(driver.set_keys(keys));
        }
        // An older state was put back: all of it is news.
        self.seen = if at + 1 < since { 0 } else { at };
        self.count()
    }

    /// Sees who is there.
    fn count(&self) -> Result<(), EtcdError> {
        let (found, _) = self.replicas.etcd.list(REPLICAS, 0)?;
        let mut all: Vec<Replica> = Vec::new();
        for entry in found.iter().take(REPLICAS_MAX) {
            let id = entry.key.strip_prefix(REPLICAS).unwrap_or_default().to_owned();
            match serde_json::from_slice::<Said>(&entry.value) {
                Ok(said) => all.push(Replica { id, addresses: said.addresses }),
                Err(error) => tracing::warn!("{} in etcd can't be read: {error}", entry.key),
            }
        }
        self.replicas.count.store(all.len().max(1), Ordering::Relaxed);
        // Who takes no nodes is no concern of theirs.
        all.retain(|replica| !replica.addresses.is_empty());
        if let Some(cluster) = &self.followed.cluster {
            cluster.set_schedulers(Schedulers { own: Some(self.replicas.id.clone()), all });
        }
        Ok(())
    }
}
