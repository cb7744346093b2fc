//! The tab as a node of a cluster: `weir-node` over the browser's WebTransport.
use crate::Model;
use js_sys::{Function, Promise, Uint8Array};
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;
use weir_node::{Credentials, Machine, Resident, Stock, Worker, WorkerError};
use weir_transport::{Link, Proof, RefusalCode, signed_by_node};

/// A node, with models or still without.
#[wasm_bindgen]
pub struct Node {
    worker: Worker,
    link: RefCell<Option<Rc<Link>>>,
    /// Tokens made before it held anything for others.
    before: Cell<u64>,
}

#[wasm_bindgen]
impl Node {
    /// `name` is for people, as `device` is; it has so many bytes of memory for models.
    #[wasm_bindgen(constructor)]
    pub fn new(name: &str, device: &str, memory: f64) -> Node {
        let machine = Machine {
            devices: vec![device.to_owned()],
            memory: memory.max(0.0) as u64,
            ..Machine::default()
        };
        Node {
            worker: Worker::new(name, machine, Vec::new(), Stock::none()),
            link: RefCell::default(),
            before: Cell::new(0),
        }
    }

    /// Tries a model out, which was loaded for a cluster (see `load.rs`), and offers it under this name. Returns JSON:
    /// `prefill_tokens_per_s`, and `token_ms` from one token of output to the next, as far as that was measured.
    pub async fn hold(&self, model: &Model, name: String) -> Result<String, JsError> {
        let (held, text) = model.describe(name)?;
        let resident = Resident::new(held, text, model.engine());
        resident.try_out().await;
        self.before.set(self.before.get() + resident.engine_status().tokens_generated);
        let rates = resident.rates();
        self.worker.hold(resident);
        let token_ms = rates.token_time_alone.as_secs_f64() * 1e3;
        Ok(json!({ "prefill_tokens_per_s": rates.prefill_tokens_per_s, "token_ms": token_ms }).to_string())
    }

    /// Serves the scheduler at `url`, which shows the certificate with this SHA-256, until the link closes. `key` is the
    /// public half of an Ed25519 key, with which `sign` signs bytes (and promises the signature). Without a token from a join
    /// link a person is asked. `welcome` is called once it is in. Returns JSON: `message`, why it ended, and `refused`, the
    /// kind of refusal, where it was one.
    pub async fn serve(
        &self,
        url: String,
        certificate: Vec<u8>,
        key: Vec<u8>,
        sign: Function,
        token: Option<String>,
        welcome: Function,
    ) -> Result<String, JsError> {
        let hash = certificate.try_into().map_err(|_| JsError::new("a SHA-256 has 32 bytes"))?;
        let link = Rc::new(Link::connect(&url, hash).await?);
        let binding = link.binding().ok_or_else(|| JsError::new("the link can't be proved"))?;
        let signature = signature(&sign, &signed_by_node(&binding)).await?;
        let proof = Proof { key: hex(&key), signature: hex(&signature) };
        let credentials = Credentials { proof: Some(proof), ask: token.is_none(), token };
        self.link.replace(Some(link.clone()));
        let mut welcomes = self.worker.welcomes();
        let mut serving = std::pin::pin!(self.worker.serve(&link, credentials));
        let why = loop {
            tokio::select! {
                why = &mut serving => break why,
                Ok(()) = welcomes.changed() => {
                    if let Err(error) = welcome.call0(&JsValue::NULL) {
                        crate::host::error(&format!("{error:?}"));
                    }
                }
            }
        };
        self.link.replace(None);
        let refused = match &why {
            WorkerError::Refused(refusal) => Some(match refusal.code {
                RefusalCode::Confirm => "confirm",
                RefusalCode::Token => "token",
                RefusalCode::Revoked => "revoked",
                RefusalCode::Full => "full",
                RefusalCode::Version => "version",
                RefusalCode::Proof => "proof",
                RefusalCode::Other => "other",
            }),
            WorkerError::Version(_) => Some("version"),
            _ => None,
        };
        Ok(json!({ "message": why.to_string(), "refused": refused }).to_string())
    }

    /// Takes nothing new, and gives back what others can take; or is there again.
    pub fn drain(&self, on: bool) {
        if on { self.worker.drain() } else { self.worker.resume() }
    }

    /// Closes the link, if there is one.
    pub fn close(&self, reason: &str) {
        if let Some(link) = &*self.link.borrow() {
            link.close(reason);
        }
    }

    /// JSON: `running` requests, `queued` ones, `tokens` made for others so far, and `trouble`, if an engine has any.
    pub fn figures(&self) -> String {
        let residents = self.worker.residents();
        let statuses: Vec<_> = residents.iter().map(Resident::engine_status).collect();
        let tokens: u64 = statuses.iter().map(|status| status.tokens_generated).sum();
        let trouble = residents.iter().find_map(Resident::trouble);
        json!({
            "running": self.worker.running(),
            "queued": statuses.iter().map(|status| status.queued).sum::<usize>(),
            "tokens": tokens.saturating_sub(self.before.get()),
            "trouble": trouble,
        })
        .to_string()
    }
}

async fn signature(sign: &Function, bytes: &[u8]) -> Result<Vec<u8>, JsError> {
    let failed = |error: JsValue| JsError::new(&format!("the key can't sign: {error:?}"));
    let promise = sign.call1(&JsValue::NULL, &Uint8Array::from(bytes)).map_err(failed)?;
    let signature = JsFuture::from(promise.unchecked_into::<Promise>()).await.map_err(failed)?;
    Ok(Uint8Array::new(&signature).to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
