//! An answer as it comes.
use crate::ClientError;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Pieces that may lie ready before whoever makes them has to wait.
const AHEAD: usize = 64;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// More text: whole characters, never empty.
    Text(String),
    /// The last piece of every answer that succeeded.
    End(End),
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub finish: Finish,
    /// What it took; zeros where the endpoint doesn't say.
    pub usage: Usage,
    /// The model that answered, as the endpoint calls it.
    pub model: String,
    /// The nodes that took part, first to last, where the endpoint says so: several where one was lost, and another went on.
    pub nodes: Vec<String>,
}

/// Why an answer ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model was done, or a stop string came.
    Stop,
    /// The limit on tokens, or the end of the context.
    Length,
    /// Something that only some endpoints know, in their words.
    Other(String),
}

/// Tokens that an answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of those, known from earlier requests.
    pub cached_tokens: u32,
    /// Of the answer.
    pub output_tokens: u32,
}

/// Pieces in order, then one [`Piece::End`] or an error, then nothing. Dropping it cancels the request.
#[derive(Debug)]
pub struct Answer {
    pieces: mpsc::Receiver<Result<Piece, ClientError>>,
    task: AbortHandle,
    ended: bool,
}

/// Cancels an answer from elsewhere: a signal handler, another task. The answer then ends with
/// [`ClientError::Cancelled`], unless it had ended already.
#[derive(Clone, Debug)]
pub struct Canceller(AbortHandle);

impl Canceller {
    /// Ends the answer.
    pub fn cancel(&self) {
        self.0.abort();
    }
}

/// Where the pieces of an answer go.
pub(crate) type Out = mpsc::Sender<Result<Piece, ClientError>>;

impl Answer {
    /// The answer that `make` gives into its channel, on a task of its own.
    pub(crate) fn of<F>(make: impl FnOnce(Out) -> F) -> Answer
    where
        F: Future<Output = Result<End, ClientError>> + Send + 'static,
    {
        let (out, pieces) = mpsc::channel(AHEAD);
        let making = make(out.clone());
        let task = tokio::spawn(async move {
            let last = making.await.map(Piece::End);
            let _ = out.send(last).await;
        });
        Answer { pieces, task: task.abort_handle(), ended: false }
    }

    /// The next piece; none after the end.
    pub async fn next(&mut self) -> Option<Result<Piece, ClientError>> {
        std::future::poll_fn(|context| self.poll_piece(context)).await
    }

    /// All of it.
    pub async fn text(mut self) -> Result<(String, End), ClientError> {
        let mut text = String::new();
        loop {
            match self.next().await.unwrap_or(Err(ClientError::Cancelled))? {
                Piece::Text(more) => text.push_str(&more),
                Piece::End(end) => return Ok((text, end)),
            }
        }
    }

    /// A way to cancel it while somebody else reads it.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.task.clone())
    }

    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Piece, ClientError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // the channel closes without a last piece only if the task was aborted
        let piece = std::task::ready!(self.pieces.poll_recv(context)).unwrap_or(Err(ClientError::Cancelled));
        self.ended = !matches!(piece, Ok(Piece::Text(_)));
        Poll::Ready(Some(piece))
    }
}

impl futures_core::Stream for Answer {
    type Item = Result<Piece, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_piece(context)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
