//! Links of a page or its worker: the browser's own WebTransport.
use super::{AnyReceiver, AnySender, LinkError, Stream, Urgency};
use crate::Frame;
use crate::frames::Assembler;
use crate::signed::of_session;
use js_sys::{Array, Object, Promise, Reflect, Uint8Array};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use tokio::sync::Mutex;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::{JsFuture, spawn_local};

/// Of a reason that the other end gives, at most, in characters.
const REASON_MAX: usize = 500;

#[wasm_bindgen]
extern "C" {
    #[derive(Debug)]
    type WebTransport;
    #[wasm_bindgen(constructor, catch)]
    fn new(url: &str, options: &Object) -> Result<WebTransport, JsValue>;
    #[wasm_bindgen(method, getter)]
    fn ready(this: &WebTransport) -> Promise;
    #[wasm_bindgen(method, getter)]
    fn closed(this: &WebTransport) -> Promise;
    #[wasm_bindgen(method, catch)]
    fn close(this: &WebTransport, info: &Object) -> Result<(), JsValue>;
    #[wasm_bindgen(method, js_name = createBidirectionalStream, catch)]
    fn create(this: &WebTransport) -> Result<Promise, JsValue>;
    #[wasm_bindgen(method, getter, js_name = incomingBidirectionalStreams)]
    fn bidirectional(this: &WebTransport) -> Readable;
    #[wasm_bindgen(method, getter, js_name = incomingUnidirectionalStreams)]
    fn unidirectional(this: &WebTransport) -> Readable;

    type Bidirectional;
    #[wasm_bindgen(method, getter)]
    fn readable(this: &Bidirectional) -> Readable;
    #[wasm_bindgen(method, getter)]
    fn writable(this: &Bidirectional) -> Writable;

    type Readable;
    #[wasm_bindgen(method, js_name = getReader, catch)]
    fn reader(this: &Readable) -> Result<Reader, JsValue>;

    #[derive(Debug)]
    type Reader;
    #[wasm_bindgen(method)]
    fn read(this: &Reader) -> Promise;
    #[wasm_bindgen(method)]
    fn cancel(this: &Reader) -> Promise;

    type Writable;
    #[wasm_bindgen(method, js_name = getWriter, catch)]
    fn writer(this: &Writable) -> Result<Writer, JsValue>;
    #[wasm_bindgen(method, setter, js_name = sendOrder)]
    fn set_order(this: &Writable, order: f64);

    #[derive(Debug)]
    type Writer;
    #[wasm_bindgen(method)]
    fn write(this: &Writer, chunk: &Uint8Array) -> Promise;
    #[wasm_bindgen(method, js_name = close)]
    fn end(this: &Writer) -> Promise;
    #[wasm_bindgen(method)]
    fn abort(this: &Writer) -> Promise;

    /// What a reader gives, and how a session ended.
    type Given;
    #[wasm_bindgen(method, getter)]
    fn done(this: &Given) -> bool;
    #[wasm_bindgen(method, getter)]
    fn value(this: &Given) -> JsValue;
    #[wasm_bindgen(method, getter)]
    fn reason(this: &Given) -> Option<String>;
    #[wasm_bindgen(method, getter)]
    fn message(this: &Given) -> Option<String>;
    #[wasm_bindgen(method, getter)]
    fn source(this: &Given) -> Option<String>;
}

/// Whatever becomes of it.
fn ignore(promise: Promise) {
    spawn_local(async move { _ = JsFuture::from(promise).await });
}

fn told(words: Option<String>, otherwise: &str) -> LinkError {
    let words = words.filter(|words| !words.is_empty()).unwrap_or_else(|| otherwise.to_owned());
    LinkError::Closed(words.chars().take(REASON_MAX).collect())
}

/// A stream's error is that stream's end, any other is the session's.
fn error(thrown: JsValue) -> LinkError {
    let thrown: Given = thrown.unchecked_into();
    match thrown.source().as_deref() {
        Some("stream") => LinkError::Reset,
        _ => told(thrown.message(), "the browser doesn't say why"),
    }
}

/// A reader whose read survives a future that is dropped.
#[derive(Debug)]
struct Pump {
    reader: Reader,
    pending: Option<JsFuture>,
}

impl Pump {
    fn of(readable: &Readable) -> Result<Pump, LinkError> {
        Ok(Pump { reader: readable.reader().map_err(error)?, pending: None })
    }

    /// The next thing; none at the end.
    async fn next(&mut self) -> Result<Option<JsValue>, LinkError> {
        let pending = self.pending.get_or_insert_with(|| self.reader.read().into());
        let given = pending.await;
        self.pending = None;
        let given: Given = given.map_err(error)?.unchecked_into();
        Ok((!given.done()).then(|| given.value()))
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        // At its end already, perhaps.
        ignore(self.reader.cancel());
    }
}

#[derive(Debug)]
pub(crate) struct Link {
    session: WebTransport,
    binding: [u8; 32],
    incoming: Mutex<Pump>,
    /// Why this end closed it.
    reason: RefCell<Option<String>>,
}

impl Link {
    pub async fn connect(url: &str, certificate: [u8; 32]) -> Result<Link, LinkError> {
        let set = |object: &Object, key: &str, value: &JsValue| {
            // A fresh object takes anything.
            _ = Reflect::set(object, &key.into(), value);
        };
        let (options, hash) = (Object::new(), Object::new());
        set(&hash, "algorithm", &"sha-256".into());
        set(&hash, "value", &Uint8Array::from(certificate.as_slice()));
        set(&options, "serverCertificateHashes", &Array::of1(&hash));
        let session = WebTransport::new(url, &options).map_err(error)?;
        // Whoever asks later how it ended still hears of it.
        ignore(session.closed());
        JsFuture::from(session.ready()).await.map_err(error)?;
        let nonce = nonce(&session).await?;
        let binding = Sha256::digest(of_session(&certificate, &nonce)).into();
        let incoming = Mutex::new(Pump::of(&session.bidirectional())?);
        Ok(Link { session, binding, incoming, reason: RefCell::default() })
    }

    fn stream(&self, both: JsValue) -> Result<Stream, LinkError> {
        let both: Bidirectional = both.unchecked_into();
        let writable = both.writable();
        let writer = writable.writer().map_err(error)?;
        let receive = Receiver { pump: Pump::of(&both.readable())?, frames: Assembler::default() };
        Ok(Stream {
            send: super::Sender(AnySender::Page(Sender { writable, writer, finished: false })),
            receive: super::Receiver(AnyReceiver::Page(receive)),
        })
    }

    pub async fn open(&self) -> Result<Stream, LinkError> {
        let opened = self.session.create().map_err(error)?;
        self.stream(JsFuture::from(opened).await.map_err(error)?)
    }

    pub async fn accept(&self) -> Result<Stream, LinkError> {
        match self.incoming.lock().await.next().await {
            Ok(Some(both)) => self.stream(both),
            Ok(None) | Err(_) => Err(self.end().await),
        }
    }

    pub fn close(&self, reason: &str) {
        // Only the first reason counts.
        self.reason.borrow_mut().get_or_insert_with(|| reason.to_owned());
        let info = Object::new();
        _ = Reflect::set(&info, &"closeCode".into(), &0.into());
        _ = Reflect::set(
            &info,
            &"reason".into(),
            &reason.chars().take(REASON_MAX).collect::<String>().into(),
        );
        // An error means that it is closed.
        _ = self.session.close(&info);
    }

    pub async fn closed(&self) {
        self.end().await;
    }

    /// How it ended, once it has.
    async fn end(&self) -> LinkError {
        let ended = JsFuture::from(self.session.closed()).await;
        if let Some(reason) = &*self.reason.borrow() {
            return LinkError::Closed(reason.clone());
        }
        match ended {
            Ok(info) => told(info.unchecked_into::<Given>().reason(), "the scheduler closed it"),
            Err(thrown) => told(thrown.unchecked_into::<Given>().message(), "the connection was lost"),
        }
    }

    pub fn binding(&self) -> [u8; 32] {
        self.binding
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close("the other end is gone");
    }
}

/// The first 32 bytes of the first unidirectional stream.
async fn nonce(session: &WebTransport) -> Result<[u8; 32], LinkError> {
    let silent = || LinkError::Closed("the scheduler did not introduce itself".into());
    let mut streams = Pump::of(&session.unidirectional())?;
    let stream: Readable = streams.next().await?.ok_or_else(silent)?.unchecked_into();
    let mut chunks = Pump::of(&stream)?;
    let mut bytes = Vec::new();
    while bytes.len() < 32 {
        let chunk: Uint8Array = chunks.next().await?.ok_or_else(silent)?.unchecked_into();
        bytes.extend(chunk.to_vec());
    }
    bytes.first_chunk().copied().ok_or_else(silent)
}

/// Reset when dropped without having been finished.
pub(crate) struct Sender {
    writable: Writable,
    writer: Writer,
    finished: bool,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sender({:?})", self.writer)
    }
}

impl Sender {
    /// A frame is taken whole, even if the future is dropped.
    pub async fn send(&mut self, frame: Frame) -> Result<(), LinkError> {
        let written = self.writer.write(&Uint8Array::from(&frame.bytes()[..]));
        JsFuture::from(written).await.map(drop).map_err(error)
    }

    pub fn finish(mut self) {
        self.finished = true;
        // An error means that the other end wants nothing more.
        ignore(self.writer.end());
    }

    pub fn set_urgency(&self, urgency: Urgency) {
        // Browsers that don't know it lose nothing by it.
        self.writable.set_order(f64::from(urgency as i32));
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.finished {
            ignore(self.writer.abort());
        }
    }
}

#[derive(Debug)]
pub(crate) struct Receiver {
    pump: Pump,
    frames: Assembler,
}

impl Receiver {
    pub async fn next(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.frames.take()? {
                return Ok(Some(frame));
            }
            match self.pump.next().await? {
                Some(chunk) => {
                    let chunk: Uint8Array = chunk.unchecked_into();
                    self.frames.push(chunk.to_vec().into());
                }
                None => return Ok(self.frames.end().map(|()| None)?),
            }
        }
    }
}
