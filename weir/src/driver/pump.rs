//! Carries one attempt at a request: sends it to the node and reads what comes back, no faster than the client reads.
use super::ServedModel;
use super::bill::Receipt;
use super::conductor::Command;
use super::conversation::Talk;
use crate::books::Refused;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;
use weir_scheduler::{Event, Failure, FailureKind, FromNode, Generate, NodeId, RequestId, Token};
use weir_transport::{Frame, Link, Message, Stream};

/// An attempt at a request.
pub(super) struct Pump {
    pub node: NodeId,
    pub request: RequestId,
    pub attempt: u32,
    /// Where its events will go: each takes a place here before it is handed to the conductor.
    pub client: mpsc::Sender<Event>,
    pub commands: mpsc::Sender<Command>,
}

/// A token, and its place in the client's queue.
pub(super) type Delivery = (Token, OwnedPermit<Event>);

/// The model whose tokens a request is to be put into, and what is said in it; none where either isn't known.
pub(super) type Reword = Option<(Arc<ServedModel>, Talk)>;

/// Why a pump stops.
pub(super) enum Stop {
    /// The attempt's end has been told.
    Told,
    /// It broke: why.
    Broke(String),
    /// The client is gone.
    ReaderGone,
}

impl Pump {
    /// Runs until the attempt has ended. Dropping the future resets the stream, which cancels the attempt.
    pub async fn run(self, link: Arc<Link>, ask: Generate, reword: Option<Reword>) {
        let Pump { node, request, attempt, .. } = self;
        let carried = match self.reword(ask, reword).await {
            Ok((ask, shift)) => self.carry(&link, ask, shift).await,
            Err(stop) => Err(stop),
        };
        match carried {
            Err(Stop::Broke(reason)) => self.tell(Command::Broken { node, request, attempt, reason }).await,
            Err(Stop::ReaderGone) => self.tell(Command::Cancel(request)).await,
            Ok(()) | Err(Stop::Told) => {}
        }
    }

    /// Whether it may be sent: what it may cost is on disk, if it has to be.
    pub async fn is_paid(&self, receipt: Option<Receipt>) -> bool {
        let Some(receipt) = receipt else { return true };
        let Err(refused) = receipt.wait().await else { return true };
        let failure = match refused {
            Refused::Taken => {
                Failure { kind: FailureKind::Budget { after_s: 2 }, message: refused.to_string() }
            }
            Refused::Unwritten(why) => Failure {
                kind: FailureKind::Unbooked,
                message: format!(
                    "what it may cost can't be booked now: {why}; try again, or another scheduler"
                ),
            },
        };
        self.tell_end(Event::Failed(failure)).await;
        false
    }

    /// The request in the words of the node's model, where they aren't the ones it came in; and by how much the node's
    /// positions differ from ours.
    async fn reword(&self, mut ask: Generate, reword: Option<Reword>) -> Result<(Generate, u32), Stop> {
        let Some(reword) = reword else { return Ok((ask, 0)) };
        let work = move || {
            let (model, talk) = reword.ok_or("it can't be put into the tokens of another model")?;
            talk.reword(&model, &mut ask).map(|shift| (ask, shift))
        };
        let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()));
        match done {
            Ok(done) => Ok(done),
            Err(message) => {
                self.tell_end(Event::Failed(Failure { kind: FailureKind::Invalid, message })).await;
                Err(Stop::Told)
            }
        }
    }

    pub(super) async fn tell(&self, command: Command) {
        // Without a conductor nobody needs to know.
        _ = self.commands.send(command).await;
    }

    pub(super) async fn tell_end(&self, event: Event) {
        let from = FromNode::Event { request: self.request, attempt: self.attempt, event };
        self.tell(Command::FromNode { node: self.node, from }).await;
    }

    async fn carry(&self, link: &Link, ask: Generate, shift: u32) -> Result<(), Stop> {
        let broke = |error: &dyn std::fmt::Display| Stop::Broke(format!("its stream broke: {error}"));
        let frame = match Frame::generate(ask) {
            Ok(frame) => frame,
            Err(error) => {
                let failure = Failure { kind: FailureKind::Invalid, message: error.to_string() };
                self.tell_end(Event::Failed(failure)).await;
                return Err(Stop::Told);
            }
        };
        let mut stream = link.open().await.map_err(|e| broke(&e))?;
        stream.send.send(frame).await.map_err(|e| broke(&e))?;
        loop {
            // A place first: what can't be delivered isn't read, so that the stream holds up the node.
            let place = self.place().await?;
            let frame = self.next(&mut stream).await?.ok_or_else(|| broke(&"it ended early"))?;
            match frame.read().map_err(|e| broke(&e))? {
                Message::Tokens(tokens) if (tokens.request(), tokens.attempt()) == self.about() => {
                    let mut deliveries = Vec::with_capacity(tokens.len());
                    let mut place = Some(place);
                    for mut token in tokens.iter() {
                        token.position = token.position.wrapping_add(shift);
                        // What was coalesced is taken piece by piece as well: it is bounded by the frame.
                        let place = match place.take() {
                            Some(place) => place,
                            None => match self.client.clone().try_reserve_owned() {
                                Ok(place) => place,
                                Err(_) => {
                                    self.deliver(std::mem::take(&mut deliveries)).await;
                                    self.place().await?
                                }
                            },
                        };
                        deliveries.push((token, place));
                    }
                    self.deliver(deliveries).await;
                }
                Message::End { request, attempt, event } if (request, attempt) == self.about() => {
                    drop(place);
                    stream.send.retire();
                    self.tell_end(event).await;
                    return Ok(());
                }
                _ => return Err(broke(&format!("a {:?} frame out of place", frame.kind()))),
            }
        }
    }

    fn about(&self) -> (RequestId, u32) {
        (self.request, self.attempt)
    }

    pub(super) async fn deliver(&self, deliveries: Vec<Delivery>) {
        let Pump { node, request, attempt, .. } = *self;
        if !deliveries.is_empty() {
            self.tell(Command::Tokens { node, request, attempt, deliveries }).await;
        }
    }

    async fn next(&self, stream: &mut Stream) -> Result<Option<Frame>, Stop> {
        tokio::select! {
            biased;
            frame = stream.receive.next() => frame.map_err(|e| Stop::Broke(format!("its stream broke: {e}"))),
            () = self.client.closed() => Err(Stop::ReaderGone),
        }
    }

    /// A place in the client's queue; while there is none, the node isn't to blame for silence.
    pub(super) async fn place(&self) -> Result<OwnedPermit<Event>, Stop> {
        match self.client.clone().try_reserve_owned() {
            Ok(place) => Ok(place),
            Err(TrySendError::Closed(_)) => Err(Stop::ReaderGone),
            Err(TrySendError::Full(client)) => {
                self.tell(Command::Reader { request: self.request, behind: true }).await;
                let place = client.reserve_owned().await.map_err(|_| Stop::ReaderGone)?;
                self.tell(Command::Reader { request: self.request, behind: false }).await;
                Ok(place)
            }
        }
    }
}
