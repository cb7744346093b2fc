//! Reads what a node says of itself.
use super::conductor::Command;
use super::shelf::Shelf;
use super::{ServedModel, Source, start};
use crate::cluster::{Cluster, Member, Schedulers};
use crate::once::Once;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;
use weir_node::{ModelText, TEXT_MAX};
use weir_scheduler::{FromNode, Held, NodeId, Profile};
use weir_transport::{
    Fetch, Frame, Hello, Link, LinkError, Message, Order, Place, Refusal, RefusalCode, Stream, VERSION,
    Welcome,
};

/// How long a node may take to say what it is.
const GREETING: Duration = Duration::from_secs(10);
/// How long a node that isn't welcome may take to hear so.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often nodes send a heartbeat. The scheduler suspects them after several times as long.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// For a model's tokenizer to come.
const FETCHING: Duration = Duration::from_secs(60);
/// Orders on their way to a node, at most.
const ORDERS_MAX: usize = 16;

/// Who may come in by a link.
pub(super) enum Gate {
    /// Whoever holds the other end: it was made in this process.
    Open,
    /// Members of the cluster.
    Cluster {
        cluster: Arc<Cluster>,
        /// Where the link comes from.
        from: SocketAddr,
        /// Held until the other end has proved itself.
        _places: (OwnedSemaphorePermit, Place),
        refusals: Refusals,
    },
}

/// Which refusals were logged.
pub(super) type Refusals = Arc<Once<(IpAddr, RefusalCode)>>;

/// Logs a refusal, unless the same machine was refused for the same lately.
pub(super) fn log(refusals: &Refusals, from: SocketAddr, code: RefusalCode, message: &str) {
    if !refusals.first((from.ip(), code)) {
        return;
    }
    match code {
        RefusalCode::Confirm => tracing::warn!("{message} (from {from})"),
        _ => tracing::warn!("a node at {from} was turned away: {message}"),
    }
}

impl Gate {
    /// Somebody may not come in: why.
    fn refuse(&self, code: RefusalCode, message: String) -> String {
        if let Gate::Cluster { from, refusals, .. } = self {
            log(refusals, *from, code, &message);
        }
        message
    }
}

/// A node's link, and where what it says goes.
struct Attendant {
    link: Arc<Link>,
    node: NodeId,
    shelf: Arc<Shelf>,
    /// Which it has to be a member of.
    cluster: Option<Arc<Cluster>>,
    commands: mpsc::WeakSender<Command>,
}

/// Attends to the node at the other end of `link` until the link closes. The task holds no driver alive.
pub(super) fn spawn(
    link: Link,
    gate: Gate,
    node: NodeId,
    shelf: Arc<Shelf>,
    commands: mpsc::Sender<Command>,
) {
    let cluster = match &gate {
        Gate::Open => None,
        Gate::Cluster { cluster, .. } => Some(cluster.clone()),
    };
    let attendant = Attendant { link: Arc::new(link), node, shelf, cluster, commands: commands.downgrade() };
    tokio::spawn(async move {
        let greeted = timeout(GREETING, attendant.greet(&gate)).await;
        let late = |_| gate.refuse(RefusalCode::Other, "it did not introduce itself".into());
        let greeted = greeted.map_err(late);
        drop(gate);
        let reason = match greeted {
            Err(reason) => reason,
            Ok(Err(reason)) => reason,
            Ok(Ok((member, control))) => match attendant.listen(member, control).await {
                Ok(()) => "it hung up".into(),
                Err(reason) => reason,
            },
        };
        tracing::debug!(node = node.0, "node lost: {reason}");
        attendant.link.close(&reason);
        if let Some(commands) = attendant.commands.upgrade() {
            // Without a conductor nobody needs to know.
            _ = commands.send(Command::Lost { node, reason }).await;
        }
    });
}

impl Attendant {
    /// Lets a node in or turns it away.
    async fn greet(&self, gate: &Gate) -> Result<(Option<Member>, Stream), String> {
        let nonsense = |why: String| gate.refuse(RefusalCode::Other, why);
        let mut control = self.link.accept().await.map_err(text)?;
        let frame = match control.receive.next().await {
            Err(LinkError::Frame(error)) => return Err(nonsense(error.to_string())),
            frame => frame.map_err(text)?.ok_or("it hung up")?,
        };
        let Message::Hello(hello) = frame.read().map_err(|e| nonsense(e.to_string()))? else {
            return Err(nonsense(format!("its first word is a {:?} frame", frame.kind())));
        };
        let admitted = self.admit(hello, gate).await;
        let heartbeat_ms = HEARTBEAT.as_millis() as u32;
        let refused = admitted.as_ref().err().cloned();
        // Sent whatever it speaks, so that it can tell its user.
        let schedulers = match (&self.cluster, &refused) {
            (Some(cluster), None) => cluster.schedulers().borrow().clone(),
            _ => Schedulers::default(),
        };
        let Schedulers { own: replica, all: replicas } = schedulers;
        let welcome =
            Welcome { version: VERSION, node: self.node.0, heartbeat_ms, refused, replica, replicas };
        control.send.send(Frame::welcome(&welcome)).await.map_err(text)?;
        match admitted {
            Ok(member) => Ok((member, control)),
            Err(refusal) => {
                let message = gate.refuse(refusal.code, refusal.message);
                // Closing at once would overtake the refusal.
                _ = timeout(FAREWELL, self.link.closed()).await;
                Err(message)
            }
        }
    }

    async fn admit(&self, hello: Hello, gate: &Gate) -> Result<Option<Member>, Refusal> {
        let Gate::Cluster { cluster, .. } = gate else {
            return match hello.versions.contains(&VERSION) {
                true => Ok(None),
                false => {
                    let message = format!("it speaks protocol versions {:?}, not {VERSION}", hello.versions);
                    Err(Refusal { code: RefusalCode::Version, message })
                }
            };
        };
        let no_proof = || Refusal { code: RefusalCode::Proof, message: "the link can't be proved".into() };
        let binding = self.link.binding().ok_or_else(no_proof)?;
        let (cluster, web) = (cluster.clone(), self.link.is_web());
        // A new node is written to disk.
        let admit = move || cluster.admit(&hello, &binding, web, SystemTime::now());
        let admitted = tokio::task::spawn_blocking(admit).await;
        admitted
            .map_err(|_| Refusal { code: RefusalCode::Full, message: "the scheduler is stopping".into() })?
            .map(Some)
    }

    async fn listen(&self, member: Option<Member>, mut control: Stream) -> Result<(), String> {
        let (orders, mut given) = mpsc::channel(ORDERS_MAX);
        let mut joining = Some((member.clone(), orders));
        let mut round_trip = Duration::ZERO;
        let mut schedulers = self.cluster.as_ref().map(|cluster| cluster.schedulers());
        loop {
            let others = async {
                match &mut schedulers {
                    Some(schedulers) => schedulers.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            let frame = tokio::select! {
                true = others => {
                    let all = schedulers.as_mut().map(|all| all.borrow_and_update().all.clone());
                    let order = Order::Replicas { replicas: all.unwrap_or_default() };
                    control.send.send(Frame::order(&order)).await.map_err(text)?;
                    continue;
                }
                frame = control.receive.next() => match frame.map_err(text)? {
                    Some(frame) => frame,
                    None => return Ok(()),
                },
                Some(order) = given.recv() => {
                    control.send.send(Frame::order(&order)).await.map_err(text)?;
                    continue;
                }
            };
            let node = self.node;
            let command = match frame.read().map_err(|e| e.to_string())? {
                Message::Profile(profile) => {
                    let profile = self.take_in(profile, member.as_ref()).await;
                    match joining.take() {
                        Some((member, orders)) => {
                            let (link, cluster) = (self.link.clone(), self.cluster.clone());
                            Command::Connected { node, member, cluster, profile, link, orders }
                        }
                        None => Command::FromNode { node, from: FromNode::Profile(profile) },
                    }
                }
                Message::Status(status) if joining.is_none() => {
                    Command::FromNode { node, from: FromNode::Status(status) }
                }
                _ => return Err(format!("it sent a {:?} frame out of place", frame.kind())),
            };
            let Some(commands) = self.commands.upgrade() else {
                return Err("the scheduler has stopped".into());
            };
            commands.send(command).await.map_err(|_| "the scheduler has stopped")?;
            self.link.tidy();
            let time = self.link.round_trip();
            if time.abs_diff(round_trip) > round_trip / 4 {
                round_trip = time;
                let command = Command::RoundTrip { node, time };
                commands.send(command).await.map_err(|_| "the scheduler has stopped")?;
            }
        }
    }

    /// What we make of a node's own description: whose it is, we know better. Tokenizers that we lack are fetched.
    async fn take_in(&self, mut profile: Profile, member: Option<&Member>) -> Profile {
        if let Some(member) = member {
            profile.name = member.name.clone();
            profile.trust = member.trust;
            profile.identity = member.key.0.first_chunk().map_or(0, |key| u64::from_le_bytes(*key));
        }
        for held in self.shelf.missing(&profile) {
            let fetched = timeout(FETCHING, self.fetch(&held)).await;
            let model = match fetched.unwrap_or_else(|_| Err("it took too long".into())) {
                Ok(model) => Some(model),
                Err(why) => {
                    tracing::warn!(
                        "the tokenizer of {} could not be had from {}: {why}",
                        held.name,
                        profile.name
                    );
                    None
                }
            };
            self.shelf.came(held.model, model);
        }
        profile
    }

    async fn fetch(&self, held: &Held) -> Result<ServedModel, String> {
        let id = held.text.ok_or("it has none")?;
        let mut stream = self.link.open().await.map_err(text)?;
        stream.send.send(Frame::fetch(&Fetch::of(id))).await.map_err(text)?;
        let mut bytes = Vec::new();
        while let Some(frame) = stream.receive.next().await.map_err(text)? {
            let Message::Piece(piece) = frame.read().map_err(|e| e.to_string())? else {
                return Err(format!("a {:?} frame came", frame.kind()));
            };
            if bytes.len() + piece.len() > TEXT_MAX {
                return Err(format!("it is longer than {TEXT_MAX} bytes"));
            }
            bytes.extend_from_slice(&piece);
        }
        let read = tokio::task::spawn_blocking(move || ModelText::read(id, bytes)).await;
        let (tokenizer, template) = read.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        Ok(ServedModel {
            name: held.name.clone(),
            id: held.model,
            context: held.context,
            source: Source::Nodes { tokenizer: Arc::new(tokenizer), template: Arc::new(template) },
            created: start::since_1970(),
        })
    }
}

fn text(error: LinkError) -> String {
    error.to_string()
}
