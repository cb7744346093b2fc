//! A streamed answer: server-sent events, written when the connection asks for them.
use super::Limits;
use super::error::ApiError;
use super::form::Form;
use super::parts::Next;
use super::running::{Running, Total};
use bytes::{Bytes, BytesMut};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep};

/// Silence after which a comment is sent, so that proxies keep the connection and a dead client is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Bytes after which a write doesn't wait for more events, even if they are ready.
const WRITE_BYTES: usize = 32 << 10;

/// The body of a streamed answer. It polls the generations itself, so nothing stands between a token's event and the
/// socket; dropping it, as the connection does when its client goes away, cancels them.
pub(super) struct EventStream {
    running: Running,
    form: Form,
    total: Total,
    buffer: BytesMut,
    closed: bool,
    /// Something was written since the last tick of `keep_alive`.
    wrote: bool,
    keep_alive: Interval,
    deadline: Pin<Box<Sleep>>,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    _permit: OwnedSemaphorePermit,
}

/// What ends a stream from outside.
pub(super) struct Ends {
    /// The gateway's own limit on the request, behind the one that the node keeps.
    pub(super) deadline: Instant,
    /// Resolves when the gateway goes down.
    pub(super) cut: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Held while the request is under way.
    pub(super) permit: OwnedSemaphorePermit,
}

impl EventStream {
    /// `opening` is what comes before the first event: roles, echoed prompts.
    pub(super) fn new(
        running: Running,
        form: Form,
        total: Total,
        opening: BytesMut,
        ends: Ends,
    ) -> EventStream {
        let mut keep_alive = tokio::time::interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        EventStream {
            running,
            form,
            total,
            buffer: opening,
            closed: false,
            wrote: false,
            keep_alive,
            deadline: Box::pin(tokio::time::sleep_until(ends.deadline)),
            cut: ends.cut,
            _permit: ends.permit,
        }
    }

    /// Writes what comes next of `choice`.
    pub(super) fn write(&mut self, choice: usize, next: Next) {
        match next {
            Next::Said(said) => self.form.said(&mut self.buffer, choice, said),
            Next::Finished { ending, usage } => {
                self.total.add(choice, &usage);
                self.form.finish(&mut self.buffer, choice, &ending, &self.total, &self.running);
            }
            Next::Failed(failure) => self.fail(&failure.into()),
        }
    }

    /// The next bytes of the body: everything that is ready, at once.
    pub(super) fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        while !self.closed && self.buffer.len() < WRITE_BYTES {
            match self.running.poll_next(cx) {
                Poll::Ready(Some((choice, next))) => self.write(choice, next),
                Poll::Ready(None) => self.end(),
                Poll::Pending => {
                    if self.buffer.is_empty() {
                        self.poll_clocks(cx);
                    }
                    break;
                }
            }
        }
        match (self.buffer.is_empty(), self.closed) {
            (false, _) => {
                self.wrote = true;
                Poll::Ready(Some(self.buffer.split().freeze()))
            }
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }

    fn poll_clocks(&mut self, cx: &mut Context<'_>) {
        if self.cut.as_mut().poll(cx).is_ready() {
            self.fail(&ApiError::shutting_down());
        } else if self.deadline.as_mut().poll(cx).is_ready() {
            self.fail(&ApiError::timed_out());
        }
        while !self.closed && self.keep_alive.poll_tick(cx).is_ready() {
            if !std::mem::take(&mut self.wrote) {
                self.form.silence(&mut self.buffer);
            }
        }
    }

    fn end(&mut self) {
        self.form.end(&mut self.buffer, &self.total, &self.running);
        self.closed = true;
    }

    /// Ends the stream without its proper end, so that nobody takes it for whole.
    fn fail(&mut self, error: &ApiError) {
        self.form.fail(&mut self.buffer, error);
        self.running.abandon();
        self.closed = true;
    }
}

/// When the gateway itself gives up: a little after the node should have.
pub(super) fn backstop(limits: &Limits) -> Instant {
    Instant::now() + limits.request_timeout + Duration::from_secs(1)
}
