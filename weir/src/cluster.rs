//! Who belongs to the cluster: its key, the nodes that have joined, and the tokens by which others may. Kept in a folder,
//! across restarts.

mod asking;
mod state;

use crate::etcd::Etcd;
use crate::state::{KeptError, State};
pub use asking::Asker;
use asking::Asking;
use serde::{Deserialize, Serialize};
use state::Tables;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use weir_scheduler::Trust;
use weir_transport::{
    Fingerprint, Hello, Identity, IdentityError, JoinToken, PublicKey, Refusal, RefusalCode, Replica, VERSION,
};

/// Tokens that are valid at once, at most: the oldest go first.
const TOKENS_MAX: usize = 1000;
/// Nodes that are remembered, at most.
const NODES_MAX: usize = 20_000;
/// Longest name of a node, in bytes.
const NAME_MAX: usize = 100;

/// The members of a cluster, and its identity.
///
/// A node asks to be [admitted](Cluster::admit) at every connection: with a valid token the first time, by its key ever
/// after. What is decided is on disk before it is said.
#[derive(Debug)]
pub struct Cluster {
    identity: Identity,
    state: Tables,
    members: Mutex<Members>,
    schedulers: watch::Sender<Schedulers>,
}

/// Schedulers that share a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedulers {
    /// What this one is called among them; nothing where it is alone.
    pub own: Option<String>,
    /// All of them, this one included.
    pub all: Vec<Replica>,
}

/// What another scheduler has decided of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It may not come back.
    Revoked,
    /// It gets nothing new, or does again.
    Drained(bool),
}

#[derive(Debug, Default)]
struct Members {
    nodes: BTreeMap<PublicKey, Record>,
    tokens: BTreeMap<[u8; 32], Token>,
    asking: Asking,
}

/// What is remembered of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it calls itself.
    pub name: String,
    /// A guest sees no private requests.
    pub guest: bool,
    /// Seconds since 1970.
    pub joined: u64,
    /// It gets nothing new.
    #[serde(default)]
    pub drained: bool,
    /// It may not come back.
    #[serde(default)]
    pub revoked: bool,
    /// It is revoked because its tokens were too unlikely, again and again.
    #[serde(default)]
    pub refuted: bool,
}

/// A join token, by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Token {
    /// Seconds since 1970.
    expires: u64,
    uses: u32,
    guest: bool,
}

/// What a join link allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// Machines that may join with it.
    pub uses: u32,
    /// For how long.
    pub valid: Duration,
    /// Whether they become guests.
    pub guest: bool,
}

impl Default for Invitation {
    /// One machine, within an hour, as our own.
    fn default() -> Self {
        Invitation { uses: 1, valid: Duration::from_secs(3600), guest: false }
    }
}

/// A node that was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: PublicKey,
    /// What it calls itself.
    pub name: String,
    /// Whose it is.
    pub trust: Trust,
    /// It gets nothing new.
    pub drained: bool,
}

/// What went wrong with the cluster's state.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The folder or a file in it can't be used, or what is shared can't be reached.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// No key can be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No such node, or several.
    #[error("{0}; `weir nodes` lists them")]
    Node(String),
}

impl Cluster {
    /// The cluster whose state is in `folder`; a new one if there is none.
    pub fn open(folder: &Path) -> Result<Cluster, ClusterError> {
        Cluster::within(State::open(folder).map_err(KeptError::from)?, None)
    }

    /// The same where the folder's state is open already; shared with other schedulers, where there is an etcd.
    pub fn within(state: State, etcd: Option<Etcd>) -> Result<Cluster, ClusterError> {
        let state = Tables { state, etcd };
        let new = Identity::generate()?;
        let identity = Identity::from_pkcs8(&state.key(|| new.pkcs8().to_vec())?)?;
        let members = Members { nodes: state.nodes()?, tokens: state.tokens()?, asking: Asking::default() };
        let schedulers = watch::Sender::new(Schedulers::default());
        Ok(Cluster { identity, state, members: Mutex::new(members), schedulers })
    }

    /// The schedulers of the cluster, as nodes are to know them; none, where there is one that shares nothing.
    pub fn schedulers(&self) -> watch::Receiver<Schedulers> {
        self.schedulers.subscribe()
    }

    /// These are there now.
    pub fn set_schedulers(&self, schedulers: Schedulers) {
        self.schedulers.send_if_modified(|known| {
            let differs = *known != schedulers;
            *known = schedulers;
            differs
        });
    }

    /// An entry of what is shared has changed. Says what that means for a node that may be connected.
    pub fn learn(&self, key: &str, value: &[u8]) -> Option<(PublicKey, Changed)> {
        let mut members = self.members();
        if let Some((digest, token)) = state::token(key, value) {
            members.tokens.insert(digest, token);
            return None;
        }
        let (node, record) = state::node(key, value)?;
        let before = members.nodes.insert(node, record.clone());
        let (revoked, drained) = before.map_or((false, false), |before| (before.revoked, before.drained));
        match (record.revoked && !revoked, record.drained != drained) {
            (true, _) => Some((node, Changed::Revoked)),
            (false, true) => Some((node, Changed::Drained(record.drained))),
            (false, false) => None,
        }
    }

    /// Looks up what another scheduler may have decided just now.
    fn look_up(&self, key: &PublicKey, token: Option<&JoinToken>) -> Result<(), KeptError> {
        if !self.members().nodes.contains_key(key)
            && let Some(record) = self.state.find_node(key)?
        {
            self.members().nodes.insert(*key, record);
        }
        let digest = token.map(JoinToken::digest);
        if let Some(digest) = digest
            && !self.members().tokens.contains_key(&digest)
            && let Some(token) = self.state.find_token(&digest)?
        {
            self.members().tokens.insert(digest, token);
        }
        Ok(())
    }

    /// Its key.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What nodes pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.identity.public().fingerprint()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a join token. Blocks for as long as the disk takes.
    pub fn invite(&self, invitation: Invitation, now: SystemTime) -> Result<JoinToken, ClusterError> {
        let token = JoinToken::generate()?;
        let expires = seconds(now).saturating_add(invitation.valid.as_secs());
        let kept = Token { expires, uses: invitation.uses.max(1), guest: invitation.guest };
        let mut members = self.members();
        let now = seconds(now);
        let mut dead: Vec<[u8; 32]> =
            members.tokens.iter().filter(|(_, t)| t.expires <= now).map(|(digest, _)| *digest).collect();
        if members.tokens.len() - dead.len() >= TOKENS_MAX {
            dead.extend(members.tokens.iter().min_by_key(|(_, t)| t.expires).map(|(digest, _)| *digest));
        }
        for digest in dead {
            members.tokens.remove(&digest);
            self.state.set_token(&digest, None)?;
        }
        self.state.set_token(&token.digest(), Some(&kept))?;
        members.tokens.insert(token.digest(), kept);
        Ok(token)
    }

    /// Whether the node that says `hello` over a link with this binding may come in; from a browser (`web`) it can only be
    /// a guest. Blocks for as long as the disk takes where it is new.
    pub fn admit(
        &self,
        hello: &Hello,
        binding: &[u8; 32],
        web: bool,
        now: SystemTime,
    ) -> Result<Member, Refusal> {
        if !hello.versions.contains(&VERSION) {
            let theirs: Vec<String> = hello.versions.iter().take(8).map(u16::to_string).collect();
            let message = format!(
                "the node speaks protocol version {}, the scheduler speaks version {VERSION}; update the older of the \
                 two",
                theirs.join(", ")
            );
            return Err(Refusal { code: RefusalCode::Version, message });
        }
        let refuse = |code, message: &str| Refusal { code, message: message.to_owned() };
        let proof = hello.proof.as_ref().ok_or(refuse(RefusalCode::Proof, "the node shows no key"))?;
        let key =
            PublicKey::proved(proof, binding).map_err(|e| refuse(RefusalCode::Proof, &e.to_string()))?;
        let name = short(&hello.name);
        let token: Option<JoinToken> = hello.token.as_deref().and_then(|t| t.parse().ok());
        self.look_up(&key, token.as_ref()).map_err(|e| {
            refuse(RefusalCode::Full, &format!("the scheduler can't look up who may join: {e}"))
        })?;
        let mut members = self.members();
        if let Some(record) = members.nodes.get_mut(&key) {
            if record.revoked {
                let message = match record.refuted {
                    true => {
                        "this node was shut out: the scheduler's own nodes find its tokens too unlikely, again and again"
                    }
                    false => "this node was revoked; remove its state folder and join anew with a new link",
                };
                return Err(refuse(RefusalCode::Revoked, message));
            }
            record.name = name;
            let member = record.member(key);
            return Ok(if web { Member { trust: Trust::Guest, ..member } } else { member });
        }
        if hello.ask && hello.token.is_none() {
            let code = weir_transport::code(self.fingerprint(), &key, binding);
            let Some(code) = members.asking.ask(key, name.clone(), web, code) else {
                return Err(refuse(RefusalCode::Full, "too many machines ask to join; later it may work"));
            };
            let message = format!(
                "{name} asks to join, by the code {code}: if that is on its screen, `weir admit {code}` lets it in"
            );
            return Err(Refusal { code: RefusalCode::Confirm, message });
        }
        let mut new = self.join(&mut members, token.as_ref(), name, now)?;
        new.guest |= web;
        let member = new.member(key);
        let disk =
            |e: KeptError| refuse(RefusalCode::Full, &format!("the scheduler can't remember the node: {e}"));
        self.state.add_node(&key, &new).map_err(disk)?;
        members.nodes.insert(key, new);
        Ok(member)
    }

    /// Uses a token up, once.
    fn join(
        &self,
        members: &mut Members,
        token: Option<&JoinToken>,
        name: String,
        now: SystemTime,
    ) -> Result<Record, Refusal> {
        let refuse = |message: &str| Refusal { code: RefusalCode::Token, message: message.to_owned() };
        let unknown = "the scheduler doesn't know this node, and its join link is not valid (any more); ask for a new \
                       one (`weir link`)";
        let digest = token.ok_or(refuse(unknown))?.digest();
        let kept = members.tokens.get_mut(&digest).ok_or(refuse(unknown))?;
        if kept.expires <= seconds(now) {
            return Err(refuse("the join link has expired; ask for a new one (`weir link`)"));
        }
        let used_up = "the join link has been used up; ask for a new one (`weir link`)";
        if kept.uses == 0 {
            return Err(refuse(used_up));
        }
        if members.nodes.len() >= NODES_MAX {
            let message = format!("the scheduler remembers {NODES_MAX} nodes already");
            return Err(Refusal { code: RefusalCode::Full, message });
        }
        let guest = kept.guest;
        let left = self.state.use_token(&digest, kept).map_err(|e| Refusal {
            code: RefusalCode::Full,
            message: format!("the scheduler can't use the token up: {e}"),
        })?;
        // Machines that came to another scheduler count, too.
        *kept = left.ok_or_else(|| {
            kept.uses = 0;
            refuse(used_up)
        })?;
        Ok(Record { name, guest, joined: seconds(now), drained: false, revoked: false, refuted: false })
    }

    /// Whether this token was handed out and has not expired, used up or not.
    pub fn has_invited(&self, token: &JoinToken, now: SystemTime) -> bool {
        self.members().tokens.get(&token.digest()).is_some_and(|kept| kept.expires > seconds(now))
    }

    /// Machines that ask to be let in.
    pub fn asking(&self) -> Vec<Asker> {
        self.members().asking.all()
    }

    /// Lets the machine in that asks by this code, which its owner has seen on both screens. Blocks for as long as the disk
    /// takes.
    pub fn confirm(&self, code: &str, now: SystemTime) -> Result<PublicKey, ClusterError> {
        let mut members = self.members();
        let asker = members.asking.take(code);
        let asker =
            asker.ok_or_else(|| ClusterError::Node(format!("no machine asks to join by the code {code}")))?;
        let record = Record {
            name: asker.name,
            guest: asker.guest,
            joined: seconds(now),
            drained: false,
            revoked: false,
            refuted: false,
        };
        self.state.add_node(&asker.key, &record)?;
        members.nodes.insert(asker.key, record);
        Ok(asker.key)
    }

    /// All nodes that have ever joined.
    pub fn nodes(&self) -> Vec<(PublicKey, Record)> {
        self.members().nodes.iter().map(|(key, record)| (*key, record.clone())).collect()
    }

    /// The node meant by a name, or by the beginning of its key (at least 4 digits).
    pub fn find(&self, what: &str) -> Result<PublicKey, ClusterError> {
        let members = self.members();
        let is_meant = |key: &PublicKey, record: &Record| {
            record.name == what
                || (what.len() >= 4 && key.to_string().starts_with(&what.to_ascii_lowercase()))
        };
        let mut found: Vec<_> = members.nodes.iter().filter(|(key, record)| is_meant(key, record)).collect();
        if found.len() > 1 {
            found.retain(|(_, record)| !record.revoked);
        }
        match found.as_slice() {
            [(key, _)] => Ok(**key),
            [] => Err(ClusterError::Node(format!("there is no node {what}"))),
            several => {
                Err(ClusterError::Node(format!("{} nodes are called {what}; use an id", several.len())))
            }
        }
    }

    /// A node may not come back. The caller cuts its link. Blocks for as long as the disk takes.
    pub fn revoke(&self, key: &PublicKey) -> Result<(), ClusterError> {
        self.change(key, |record| record.revoked = true)
    }

    /// A guest was found to make its tokens up: it may not come back, either. Blocks for as long as the disk takes.
    pub fn refute(&self, key: &PublicKey) -> Result<(), ClusterError> {
        self.change(key, |record| (record.revoked, record.refuted) = (true, true))
    }

    /// A node gets nothing new, or does again; across restarts. Blocks for as long as the disk takes.
    pub fn drain(&self, key: &PublicKey, on: bool) -> Result<(), ClusterError> {
        self.change(key, |record| record.drained = on)
    }

    fn change(&self, key: &PublicKey, how: impl Fn(&mut Record)) -> Result<(), ClusterError> {
        let mut members = self.members();
        let gone = || ClusterError::Node("the node is gone".into());
        let record = members.nodes.get_mut(key).ok_or_else(gone)?;
        *record = self.state.change_node(key, record, how)?;
        Ok(())
    }
}

impl Record {
    fn member(&self, key: PublicKey) -> Member {
        let trust = if self.guest { Trust::Guest } else { Trust::Own };
        Member { key, name: self.name.clone(), trust, drained: self.drained }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A name that fits a line.
fn short(name: &str) -> String {
    let clean: String = name.chars().filter(|c| !c.is_control()).collect();
    let mut end = clean.len().min(NAME_MAX);
    while !clean.is_char_boundary(end) {
        end -= 1;
    }
    clean[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: [u8; 32] = [5; 32];

    fn hello(node: &Identity, token: Option<JoinToken>) -> Hello {
        Hello {
            versions: vec![VERSION],
            software: "0".into(),
            name: "n".into(),
            proof: Some(node.prove(&BINDING)),
            token: token.map(|t| t.to_string()),
            ask: false,
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// Whether the node gets in at that second, and else why not.
    fn check(
        cluster: &Cluster,
        node: &Identity,
        token: Option<JoinToken>,
        second: u64,
    ) -> Result<(), RefusalCode> {
        cluster
            .admit(&hello(node, token), &BINDING, false, at(second))
            .map(|_| ())
            .map_err(|refusal| refusal.code)
    }

    #[test]
    fn a_token_lets_in_as_many_as_it_says_and_no_longer() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Cluster::open(folder.path()).unwrap();
        let nodes: Vec<Identity> = (0..4).map(|_| Identity::generate().unwrap()).collect();
        let valid = Duration::from_secs(10);
        let token = cluster.invite(Invitation { uses: 2, valid, guest: true }, at(100)).unwrap();
        assert_eq!(check(&cluster, &nodes[0], None, 101), Err(RefusalCode::Token));
        assert_eq!(
            check(&cluster, &nodes[0], Some(JoinToken::generate().unwrap()), 101),
            Err(RefusalCode::Token)
        );
        assert_eq!(check(&cluster, &nodes[0], Some(token), 101), Ok(()));
        assert_eq!(check(&cluster, &nodes[0], Some(token), 102), Ok(()), "known already: nothing is used up");
        assert_eq!(check(&cluster, &nodes[1], Some(token), 109), Ok(()));
        assert_eq!(check(&cluster, &nodes[2], Some(token), 109), Err(RefusalCode::Token), "used up");
        let token = cluster.invite(Invitation { uses: 2, valid, guest: false }, at(200)).unwrap();
        assert_eq!(check(&cluster, &nodes[2], Some(token), 210), Err(RefusalCode::Token), "expired");
        assert_eq!(check(&cluster, &nodes[3], Some(token), 205), Ok(()));
        let member = |n: &Identity| cluster.admit(&hello(n, None), &BINDING, false, at(300)).unwrap();
        assert_eq!((member(&nodes[0]).trust, member(&nodes[3]).trust), (Trust::Guest, Trust::Own));
        let from_a_browser = cluster.admit(&hello(&nodes[3], None), &BINDING, true, at(300)).unwrap();
        assert_eq!(from_a_browser.trust, Trust::Guest, "whatever it is elsewhere");
    }

    #[test]
    fn a_hello_of_another_link_version_or_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Cluster::open(folder.path()).unwrap();
        let node = Identity::generate().unwrap();
        let token = cluster.invite(Invitation::default(), at(0)).unwrap();
        let good = hello(&node, Some(token));
        let code = |hello: &Hello, binding| cluster.admit(hello, &binding, false, at(1)).unwrap_err().code;
        assert_eq!(code(&good, [6; 32]), RefusalCode::Proof, "replayed over another link");
        assert_eq!(code(&Hello { proof: None, ..good.clone() }, BINDING), RefusalCode::Proof);
        let old = Hello { versions: vec![0, 99], ..good.clone() };
        assert_eq!(code(&old, BINDING), RefusalCode::Version);
        let said = cluster.admit(&old, &BINDING, false, at(1)).unwrap_err().message;
        assert!(said.contains("0, 99") && said.contains("version 1"), "{said}");
        let mut forged = good.clone();
        forged.proof.as_mut().unwrap().key = Identity::generate().unwrap().public().to_string();
        assert_eq!(code(&forged, BINDING), RefusalCode::Proof);
        assert!(cluster.admit(&good, &BINDING, false, at(1)).is_ok(), "the token was not used up by those");
    }

    #[test]
    fn who_asks_gets_in_when_its_code_was_seen() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = Cluster::open(folder.path()).unwrap();
        let nodes: Vec<Identity> = (0..17).map(|_| Identity::generate().unwrap()).collect();
        let ask = |node: &Identity| Hello { ask: true, ..hello(node, None) };
        let code = |node: &Identity| cluster.admit(&ask(node), &BINDING, false, at(1)).map_err(|r| r.code);
        for node in &nodes[..16] {
            assert_eq!(code(node), Err(RefusalCode::Confirm));
            assert_eq!(code(node), Err(RefusalCode::Confirm), "coming again changes nothing");
        }
        assert_eq!(code(&nodes[16]), Err(RefusalCode::Full));
        let seen = weir_transport::code(cluster.fingerprint(), &nodes[3].public(), &BINDING);
        assert!(cluster.confirm("2222-2222", at(2)).is_err());
        assert_eq!(cluster.confirm(&seen.to_lowercase().replace('-', ""), at(2)).unwrap(), nodes[3].public());
        assert_eq!(code(&nodes[3]).unwrap().trust, Trust::Own);
        assert!(cluster.confirm(&seen, at(2)).is_err(), "once");
        assert_eq!(cluster.asking().len(), 15);
        assert_eq!(
            check(&cluster, &nodes[4], None, 3),
            Err(RefusalCode::Token),
            "asking is not being let in"
        );
    }

    #[test]
    fn what_was_decided_outlives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let nodes: Vec<Identity> = (0..3).map(|_| Identity::generate().unwrap()).collect();
        let cluster = Cluster::open(folder.path()).unwrap();
        assert!(Cluster::open(folder.path()).is_err(), "one process at a time");
        let fingerprint = cluster.fingerprint();
        let token = cluster.invite(Invitation { uses: 3, ..Invitation::default() }, at(0)).unwrap();
        for node in &nodes[..2] {
            assert_eq!(check(&cluster, node, Some(token), 1), Ok(()));
        }
        assert!(cluster.find("n").is_err(), "two are called so");
        let id = nodes[0].public().to_string();
        assert_eq!(cluster.find(&id[..8]).unwrap(), nodes[0].public());
        assert!(cluster.find(&id[..3]).is_err());
        cluster.revoke(&nodes[0].public()).unwrap();
        cluster.drain(&nodes[1].public(), true).unwrap();
        drop(cluster);

        let cluster = Cluster::open(folder.path()).unwrap();
        assert_eq!(cluster.fingerprint(), fingerprint);
        assert_eq!(check(&cluster, &nodes[0], Some(token), 2), Err(RefusalCode::Revoked));
        assert!(cluster.admit(&hello(&nodes[1], None), &BINDING, false, at(2)).unwrap().drained);
        assert_eq!(check(&cluster, &nodes[2], Some(token), 2), Ok(()));
        assert_eq!(cluster.nodes().len(), 3);
    }
}
