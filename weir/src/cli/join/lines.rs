//! The schedulers that a node serves: one, or all that share its cluster. Each has a line of its own: dialled, served, lost
//! and found again by itself, over the same engines.
use super::{ASK_AGAIN, ASKING, Belonging, SETTLED, WAIT_FIRST, WAIT_MAX, compared, jittered};
use anyhow::bail;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use weir_node::{Credentials, Schedulers, Worker, WorkerError};
use weir_transport::{DialError, Dialer, Link, RefusalCode, code};

/// Addresses that are remembered, at most.
const REMEMBERED_MAX: usize = 64;

/// A node that serves schedulers.
pub(super) struct Serving {
    pub worker: Worker,
    pub dialer: Dialer,
    pub home: Belonging,
    /// What it is called, and where it remembers what it must.
    pub name: String,
    pub folder: PathBuf,
    known: Mutex<Known>,
    /// Changes whenever other schedulers are there than before.
    news: watch::Sender<()>,
}

#[derive(Default)]
struct Known {
    /// Where each scheduler of the cluster is, as any of them said last.
    all: BTreeMap<String, Vec<String>>,
    /// Those that have a line, and whether it is up.
    lines: BTreeMap<String, bool>,
    /// A scheduler that is alone has no name.
    nameless_up: bool,
}

impl Known {
    fn is_up(&self) -> bool {
        self.nameless_up || self.lines.values().any(|up| *up)
    }
}

/// What a line waits for between attempts, and what it has told its person.
struct Patience {
    wait: Duration,
    told: bool,
    asking: Option<Instant>,
}

/// What came of an attempt that nothing forbids to repeat.
enum Lost {
    /// A person was asked, who may say yes.
    Asked,
    /// Why.
    For(String),
}

impl Serving {
    pub fn new(worker: Worker, dialer: Dialer, home: Belonging, name: String, folder: PathBuf) -> Serving {
        let (known, news) = (Mutex::default(), watch::Sender::new(()));
        Serving { worker, dialer, home, name, folder, known, news }
    }

    /// Serves all schedulers of the cluster, and finds each again whenever it is lost; returns only what trying again can't
    /// help.
    pub async fn run(self: Arc<Self>) -> anyhow::Result<()> {
        let mut lines = JoinSet::new();
        let mut news = self.news.subscribe();
        lines.spawn(self.clone().line(None));
        loop {
            tokio::select! {
                Some(ended) = lines.join_next() => ended??,
                Ok(()) = news.changed() => {}
            }
            for scheduler in self.unserved() {
                lines.spawn(self.clone().line(Some(scheduler)));
            }
            if lines.is_empty() {
                lines.spawn(self.clone().line(None));
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Schedulers without a line, which have one from now on.
    fn unserved(&self) -> Vec<String> {
        let mut known = self.known();
        let Known { all, lines, .. } = &mut *known;
        let unserved: Vec<String> = all.keys().filter(|id| !lines.contains_key(*id)).cloned().collect();
        lines.extend(unserved.iter().map(|id| (id.clone(), false)));
        unserved
    }

    /// A scheduler says who there is, over the line of `scheduler`. Whether to go on serving it over that.
    fn heard(&self, scheduler: &Mutex<Option<String>>, schedulers: &Schedulers) -> bool {
        let mut scheduler = scheduler.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = self.known();
        let Some(id) = &schedulers.own else {
            known.nameless_up = true;
            return true;
        };
        let now: BTreeMap<_, _> =
            schedulers.all.iter().map(|r| (r.id.clone(), r.addresses.clone())).collect();
        if !now.is_empty() && now != known.all {
            known.all = now;
            self.news.send_replace(());
            if let Err(error) = self.home.remember_all(&self.folder, &self.addresses(&known)) {
                tracing::warn!("the schedulers that there are can't be remembered: {error:#}");
            }
        }
        if scheduler.as_ref() != Some(id) {
            if known.lines.contains_key(id) {
                return false;
            }
            if let Some(before) = scheduler.replace(id.clone()) {
                known.lines.remove(&before);
            }
        }
        known.lines.insert(id.clone(), true);
        true
    }

    /// Where any scheduler may be.
    fn addresses(&self, known: &Known) -> Vec<String> {
        let mut all: Vec<String> = known.all.values().flatten().cloned().collect();
        all.extend(
            self.home
                .addresses
                .iter()
                .filter(|old| !known.all.values().flatten().any(|new| new == *old))
                .cloned(),
        );
        all.truncate(REMEMBERED_MAX);
        all
    }

    /// Where a line leads; nowhere, if its scheduler is gone and others are there.
    fn whither(&self, scheduler: Option<&String>) -> Option<Vec<String>> {
        let mut known = self.known();
        let Some(id) = scheduler else { return Some(self.addresses(&known)) };
        if let Some(addresses) = known.all.get(id).filter(|addresses| !addresses.is_empty()) {
            return Some(addresses.clone());
        }
        if known.is_up() {
            known.lines.remove(id);
            return None;
        }
        Some(self.addresses(&known))
    }

    fn down(&self, scheduler: &Mutex<Option<String>>) {
        let mut known = self.known();
        match &*scheduler.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(id) => _ = known.lines.insert(id.clone(), false),
            None => known.nameless_up = false,
        }
    }

    /// Serves one scheduler, for as long as it is there or may come back.
    async fn line(self: Arc<Self>, scheduler: Option<String>) -> anyhow::Result<()> {
        let scheduler = Mutex::new(scheduler);
        let own = || scheduler.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut patience = Patience { wait: WAIT_FIRST, told: false, asking: None };
        let mut news = self.news.subscribe();
        loop {
            let Some(addresses) = self.whither(own().as_ref()) else { return Ok(()) };
            let trouble = match self.dialer.dial(&addresses, self.home.cluster).await {
                Ok(link) => {
                    let lost = self.serve(&link, &scheduler, &mut patience).await;
                    self.down(&scheduler);
                    match lost? {
                        Lost::Asked => continue,
                        Lost::For(why) => why,
                    }
                }
                Err(error @ DialError::OtherCluster(_)) if !self.known().is_up() => bail!(error),
                Err(error) => error.to_string(),
            };
            if !patience.told {
                eprintln!("{trouble}; trying again until it answers");
                patience.told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(patience.wait)) => {}
                // It may be that it is there again.
                Ok(()) = news.changed() => patience.wait = WAIT_FIRST,
            }
            patience.wait = (patience.wait * 2).min(WAIT_MAX);
        }
    }

    async fn serve(
        &self,
        link: &Link,
        scheduler: &Mutex<Option<String>>,
        patience: &mut Patience,
    ) -> anyhow::Result<Lost> {
        let Serving { worker, home, name, folder, .. } = self;
        let proof = link.binding().map(|binding| home.identity.prove(&binding));
        let code = link.binding().map(|b| code(home.cluster, &home.identity.public(), &b));
        let token = home.token.map(|token| token.to_string());
        let began = Instant::now();
        let (welcome, compared_before) = (Notify::new(), patience.asking.is_some());
        let greeted = async {
            welcome.notified().await;
            if home.ask && !home.trusting && !compared_before {
                bail!("the scheduler that was found asks nobody whom it lets in: it is not yours");
            }
            if home.ask {
                home.remember(folder)?;
            }
            eprintln!("Joined as {name}. Ctrl-C leaves.");
            std::future::pending::<anyhow::Result<()>>().await
        };
        let mut first = true;
        let first = Mutex::new(&mut first);
        let hears = |schedulers: &Schedulers| {
            let goes_on = self.heard(scheduler, schedulers);
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            if goes_on && std::mem::take(&mut **first) {
                welcome.notify_one();
            }
            goes_on
        };
        let why = tokio::select! {
            why = worker.serve_one(link, Credentials { proof, token, ask: home.ask }, &hears) => why,
            failed = greeted => match failed {
                Err(error) => return Err(error),
                Ok(()) => bail!("a welcome has no end"),
            },
        };
        if let (WorkerError::Refused(refusal), Some(code)) = (&why, code)
            && refusal.code == RefusalCode::Confirm
        {
            if patience.asking.is_none() {
                compared(code, home.trusting).await?;
            }
            if patience.asking.get_or_insert_with(Instant::now).elapsed() > ASKING {
                bail!("nobody let this machine in within {} minutes", ASKING.as_secs() / 60);
            }
            tokio::time::sleep(jittered(ASK_AGAIN)).await;
            return Ok(Lost::Asked);
        }
        if let WorkerError::Refused(refusal) = &why {
            // Others may know better, but not that it was revoked.
            let is_final = refusal.code == RefusalCode::Revoked || !self.known().is_up();
            if is_final && refusal.code != RefusalCode::Full {
                bail!("the scheduler turned this node away: {}", refusal.message);
            }
        }
        if began.elapsed() > SETTLED {
            patience.wait = WAIT_FIRST;
        }
        patience.told = false;
        Ok(Lost::For(why.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_node::{Machine, Stock};
    use weir_transport::{Identity, Replica};

    fn serving(folder: &std::path::Path) -> Serving {
        let identity = Identity::generate().unwrap();
        let cluster = identity.public().fingerprint();
        let addresses = vec!["link:1".to_owned()];
        let home = Belonging { identity, addresses, cluster, token: None, ask: false, trusting: false };
        let worker = Worker::new("n", Machine::default(), Vec::new(), Stock::none());
        Serving::new(worker, Dialer::new().unwrap(), home, "n".into(), folder.to_owned())
    }

    fn says(own: &str, all: &[&str]) -> Schedulers {
        let replica = |id: &&str| Replica { id: (*id).to_owned(), addresses: vec![format!("{id}:1")] };
        Schedulers { own: Some(own.to_owned()), all: all.iter().map(replica).collect() }
    }

    #[tokio::test]
    async fn each_scheduler_has_one_line_and_the_last_of_them_is_never_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let serving = serving(folder.path());
        let line = |id: Option<&str>| Mutex::new(id.map(str::to_owned));
        let first = line(None);
        assert!(serving.heard(&first, &says("a", &["a", "b"])));
        assert_eq!(serving.unserved(), ["b"]);
        assert!(serving.unserved().is_empty(), "once");
        let second = line(Some("b"));
        assert!(!serving.heard(&second, &says("a", &["a", "b"])), "an address of both led to the first");
        assert!(serving.heard(&second, &says("b", &["a", "b"])));
        let whither = |id: &str| serving.whither(Some(&id.to_owned()));
        assert_eq!(whither("b").unwrap(), ["b:1"]);
        // It is gone from the list: while the other is up nobody looks for it.
        serving.down(&second);
        assert!(serving.heard(&first, &says("a", &["a"])));
        assert_eq!(whither("b"), None);
        serving.down(&first);
        assert!(serving.heard(&line(None), &says("c", &["c"])));
        serving.known().lines.clear();
        assert_eq!(whither("a").unwrap(), ["c:1", "link:1"], "with none up, anywhere");
        assert!(std::fs::read_to_string(folder.path().join("node.json")).unwrap().contains("c:1"));
        let alone = Schedulers::default();
        assert!(serving.heard(&line(None), &alone), "who is alone has no name");
    }
}
