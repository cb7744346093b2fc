//! What is written down of requests: what they may take before they are sent, what they took when they have ended.
use crate::books::{Books, Refused, Row};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;
use weir_scheduler::{Entry, Event, Finish, Generate, KeyId, ModelId, RequestId};

/// The conductor's way to the books, if there are any.
#[derive(Default)]
pub(super) struct Bills {
    books: Option<Arc<Books>>,
    /// The names of keys.
    pub names: BTreeMap<KeyId, Arc<str>>,
    open: HashMap<RequestId, Bill>,
    receipts: HashMap<(RequestId, u32), Receipt>,
}

/// Of a request under way.
struct Bill {
    key: KeyId,
    tags: Vec<(String, String)>,
    model: ModelId,
    prompt_tokens: u64,
    output_tokens: u64,
    nano_usd: u64,
}

/// Until it has come, what it is for isn't sent.
pub(super) struct Receipt(oneshot::Receiver<Result<(), Refused>>);

impl Receipt {
    /// That the reservation is on disk, or why it isn't.
    pub async fn wait(self) -> Result<(), Refused> {
        self.0.await.unwrap_or_else(|_| Err(Refused::Unwritten("nobody keeps the books any more".into())))
    }
}

/// How a request ran, as its client's course knows.
pub(super) struct Ran {
    pub nodes: Vec<Arc<str>>,
    pub estimated: bool,
}

impl Bills {
    pub fn new(books: Option<Arc<Books>>) -> Bills {
        Bills { books, ..Bills::default() }
    }

    /// A request has come.
    pub fn begin(&mut self, ask: &Generate) {
        if self.books.is_none() {
            return;
        }
        let bill = Bill {
            key: ask.key,
            tags: ask.tags.clone(),
            model: ask.model,
            prompt_tokens: ask.prompt.len() as u64,
            output_tokens: 0,
            nano_usd: 0,
        };
        self.open.insert(ask.request, bill);
    }

    /// A token came.
    pub fn token(&mut self, request: RequestId) {
        if let Some(bill) = self.open.get_mut(&request) {
            bill.output_tokens += 1;
        }
    }

    /// An attempt cost so much.
    pub fn spent(&mut self, request: RequestId, nano_usd: u64) {
        if let Some(bill) = self.open.get_mut(&request) {
            bill.nano_usd = bill.nano_usd.saturating_add(nano_usd);
        }
    }

    /// It was refused at once: nothing is written down.
    pub fn refused(&mut self, request: RequestId) {
        self.open.remove(&request);
    }

    /// A request has ended. `model` is what its model is called.
    pub fn end(
        &mut self,
        request: RequestId,
        event: &Event,
        ran: Ran,
        model: impl FnOnce(ModelId) -> String,
    ) {
        let (Some(bill), Some(books)) = (self.open.remove(&request), &self.books) else { return };
        let (end, usage) = match event {
            Event::Finished { reason: Finish::Stop, usage, .. } => ("stop", Some(usage)),
            Event::Finished { reason: Finish::Length, usage, .. } => ("length", Some(usage)),
            Event::Failed(failure) => (failure.kind.word(), None),
            Event::Token(_) => return,
        };
        let (prompt_tokens, output_tokens) = match usage {
            Some(usage) => (u64::from(usage.prompt_tokens), u64::from(usage.output_tokens)),
            None => (bill.prompt_tokens, bill.output_tokens),
        };
        books.ended(Row {
            at_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            key: self.names.get(&bill.key).map(|name| name.to_string()).unwrap_or_default(),
            tags: bill.tags,
            model: model(bill.model),
            nodes: ran.nodes.iter().map(|name| name.to_string()).collect(),
            prompt_tokens,
            output_tokens,
            nano_usd: bill.nano_usd,
            estimated: ran.estimated,
            end: end.to_owned(),
        });
    }

    /// What an attempt may take is to be remembered before it is sent.
    pub fn reserve(&mut self, request: RequestId, attempt: u32, entries: Vec<Entry>) {
        if let Some(books) = &self.books {
            self.receipts.insert((request, attempt), Receipt(books.reserve(entries)));
        }
    }

    /// What the attempt that is sent now has to wait for.
    pub fn receipt(&mut self, request: RequestId, attempt: u32) -> Option<Receipt> {
        self.receipts.remove(&(request, attempt))
    }

    /// What came of it.
    pub fn settle(&mut self, request: RequestId, attempt: u32, entries: Vec<Entry>) {
        self.receipts.remove(&(request, attempt));
        if let Some(books) = &self.books {
            books.settle(entries);
        }
    }
}
