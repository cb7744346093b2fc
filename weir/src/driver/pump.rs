//! Carries one attempt at a request: sends it to the node and reads what comes back, no faster than the client reads.
use super::conductor::Command;
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

/// Why a pump stops.
enum Stop {
    /// The attempt's end has been told.
    Told,
    /// It broke: why.
    Broke(String),
    /// The client is gone.
    ReaderGone,
}

impl Pump {
    /// Runs until the attempt has ended. Dropping the future resets the stream, which cancels the attempt.
    pub async fn run(self, link: Arc<Link>, ask: Generate) {
        let Pump { node, request, attempt, .. } = self;
        match self.carry(&link, ask).await {
            Err(Stop::Broke(reason)) => self.tell(Command::Broken { node, request, attempt, reason }).await,
            Err(Stop::ReaderGone) => self.tell(Command::Cancel(request)).await,
            Ok(()) | Err(Stop::Told) => {}
        }
    }

    async fn tell(&self, command: Command) {
        // Without a conductor nobody needs to know.
        _ = self.commands.send(command).await;
    }

    async fn tell_end(&self, event: Event) {
        let from = FromNode::Event { request: self.request, attempt: self.attempt, event };
        self.tell(Command::FromNode { node: self.node, from }).await;
    }

    async fn carry(&self, link: &Link, ask: Generate) -> Result<(), Stop> {
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
                    for token in tokens.iter() {
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

    async fn deliver(&self, deliveries: Vec<Delivery>) {
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
    async fn place(&self) -> Result<OwnedPermit<Event>, Stop> {
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
