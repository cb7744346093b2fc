//! The bodies that describe themselves: JSON, in which a reader passes over fields that it doesn't know.
use super::convert::sense;
use super::{FrameError, Kind};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use weir_scheduler as vocabulary;
use weir_scheduler::{BlockKey, KvType, LABEL_BYTES_MAX, LABELS_MAX, ModelId, PREFIXES_MAX, TextId, Trust};

/// How a node introduces itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions that it speaks.
    pub versions: Vec<u16>,
    /// Its program's version, for a person.
    pub software: String,
    /// Its name, for a person.
    pub name: String,
    /// That it is who it was. Links within a process need none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// From the join link, where it isn't known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Without a token: a person at the scheduler may be asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ask: bool,
}

/// A node's key, and its signature of this very connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Ed25519, 64 hexadecimal digits.
    pub key: String,
    /// Of `weir/1 node` and the link's binding; 128 hexadecimal digits.
    pub signature: String,
}

/// The scheduler's answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version to be spoken.
    pub version: u16,
    /// The number that the node has at this scheduler.
    pub node: u64,
    /// Send a `Status` at least so often, in milliseconds.
    pub heartbeat_ms: u32,
    /// It isn't welcome: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
    /// What this scheduler is called among those that share the cluster; nothing where it is alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// All of those: a node serves each of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<Replica>,
}

/// A scheduler among several that share a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// What it is called among them.
    pub id: String,
    /// Where nodes reach it: `HOST:PORT`, to be tried in turn.
    pub addresses: Vec<String>,
}

/// Why a node may not join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For the node: trying again is no use, but for [`RefusalCode::Full`].
    pub code: RefusalCode,
    /// For a person: what to do.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// No common protocol version.
    Version,
    /// The key's proof is missing or wrong.
    Proof,
    /// The join token is unknown, used up or expired.
    Token,
    /// Not yet: a person at the scheduler has to confirm it first. Trying again is the thing to do.
    Confirm,
    /// The node was revoked.
    Revoked,
    /// There are too many nodes; later it may work.
    Full,
    /// Something that a later program says.
    #[serde(other)]
    Other,
}

/// What a scheduler wants of a node, beside requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Nothing new comes any more, or things come again: for the node's person.
    Drain {
        /// Whether it drains.
        on: bool,
    },
    /// Load a model that the node offers.
    Load {
        /// Counts orders to load and unload over this link, from 1.
        number: u64,
        /// Which: SHA-256 in hexadecimal.
        model: String,
        /// Bytes of memory that it may take, KV cache included.
        bytes: u64,
    },
    /// Let go of a model.
    Unload {
        /// Counts orders to load and unload over this link, from 1.
        number: u64,
        /// Which: SHA-256 in hexadecimal.
        model: String,
    },
    /// The schedulers that share the cluster are these now.
    Replicas {
        /// All of them.
        replicas: Vec<Replica>,
    },
    /// Something that a later program says.
    #[serde(other)]
    Other,
}

impl Order {
    /// The order in a message to a node, if it is one.
    pub fn of(message: &vocabulary::ToNode) -> Option<Order> {
        Some(match *message {
            vocabulary::ToNode::Load { number, model, bytes } => {
                Order::Load { number, model: hex(&model.0), bytes }
            }
            vocabulary::ToNode::Unload { number, model } => Order::Unload { number, model: hex(&model.0) },
            vocabulary::ToNode::Generate(_) | vocabulary::ToNode::Cancel { .. } => return None,
        })
    }

    /// The model that it is about.
    pub fn model(&self) -> Option<ModelId> {
        match self {
            Order::Load { model, .. } | Order::Unload { model, .. } => unhex(model).map(ModelId),
            Order::Drain { .. } | Order::Replicas { .. } | Order::Other => None,
        }
    }
}

/// What content is to be handed out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// A model's tokenizer and chat template, by [`TextId`] in hexadecimal.
    pub text: String,
}

impl Fetch {
    /// For this text.
    pub fn of(text: TextId) -> Fetch {
        Fetch { text: hex(&text.0) }
    }

    /// Which text it is for.
    pub fn text(&self) -> Option<TextId> {
        unhex(&self.text).map(TextId)
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Exactly `N` bytes.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Entries of each list of a profile, at most.
const LIST_MAX: usize = 1024;

/// See [`vocabulary::Profile`].
#[derive(Serialize, Deserialize)]
pub(super) struct Profile {
    name: String,
    #[serde(default)]
    guest: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    provider: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    labels: Vec<(String, String)>,
    #[serde(default)]
    devices: Vec<String>,
    #[serde(default)]
    memory_free: u64,
    models: Vec<Held>,
    #[serde(default, skip_serializing_if = "is_default")]
    bandwidth: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    price: Price,
    #[serde(default, skip_serializing_if = "is_default")]
    offers: Vec<Offered>,
    #[serde(default, skip_serializing_if = "is_default")]
    loading: Vec<Loading>,
    #[serde(default, skip_serializing_if = "is_default")]
    failures: Vec<FailedLoad>,
    #[serde(default, skip_serializing_if = "is_default")]
    orders: u64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Price {
    /// Billionths of a dollar for a token.
    prompt: u64,
    output: u64,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Offered {
    model: String,
    name: String,
    weights: u64,
    bytes: u64,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct Loading {
    model: String,
    bytes: u64,
}

#[derive(PartialEq, Serialize, Deserialize)]
struct FailedLoad {
    model: String,
    why: String,
}

#[derive(Serialize, Deserialize)]
struct Held {
    model: String,
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    context: u32,
    numerics: String,
    kv: Kv,
    kv_blocks: u32,
    slots: u32,
    prefill_tokens_per_s: f32,
    token_time_alone_ns: u64,
    token_time_full_ns: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    weights: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    bytes: u64,
    #[serde(default, skip_serializing_if = "is_default")]
    pinned: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    grammars: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    prefixes: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kv {
    F16,
    Q8_0,
}

impl From<&vocabulary::Profile> for Profile {
    fn from(p: &vocabulary::Profile) -> Self {
        let offer = |offer: &vocabulary::Offered| Offered {
            model: hex(&offer.model.0),
            name: offer.name.clone(),
            weights: offer.weights,
            bytes: offer.bytes,
        };
        let loading =
            |loading: &vocabulary::Loading| Loading { model: hex(&loading.model.0), bytes: loading.bytes };
        let failure =
            |(model, why): &(ModelId, String)| FailedLoad { model: hex(&model.0), why: why.clone() };
        Profile {
            name: p.name.clone(),
            guest: p.trust == Trust::Guest,
            provider: p.trust == Trust::Provider,
            labels: p.labels.clone(),
            devices: p.devices.clone(),
            memory_free: p.memory_free,
            models: p.models.iter().map(Held::from).collect(),
            bandwidth: p.bandwidth,
            price: Price { prompt: p.price.prompt, output: p.price.output },
            offers: p.offers.iter().map(offer).collect(),
            loading: p.loading.iter().map(loading).collect(),
            failures: p.failures.iter().map(failure).collect(),
            orders: p.orders,
        }
    }
}

impl From<&vocabulary::Held> for Held {
    fn from(h: &vocabulary::Held) -> Self {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        Held {
            model: hex(&h.model.0),
            name: h.name.clone(),
            text: h.text.map(|text| hex(&text.0)),
            context: h.context,
            numerics: h.numerics.clone(),
            kv: match h.kv {
                KvType::F16 => Kv::F16,
                KvType::Q8_0 => Kv::Q8_0,
            },
            kv_blocks: h.kv_blocks,
            slots: h.slots,
            prefill_tokens_per_s: h.rates.prefill_tokens_per_s,
            token_time_alone_ns: nanos(h.rates.token_time_alone),
            token_time_full_ns: nanos(h.rates.token_time_full),
            weights: h.weights,
            bytes: h.bytes,
            pinned: h.pinned,
            grammars: h.grammars,
            prefixes: h.prefixes.iter().map(|key| hex(&key.0)).collect(),
        }
    }
}

const KIND: Kind = Kind::Profile;

fn model(id: &str) -> Result<ModelId, FrameError> {
    digest(id).map(ModelId)
}

fn digest<const N: usize>(digits: &str) -> Result<[u8; N], FrameError> {
    unhex(digits).ok_or(FrameError::Senseless { kind: KIND, why: "an id has not its hexadecimal digits" })
}

fn name(name: String) -> Result<String, FrameError> {
    sense(KIND, !name.is_empty() && name.len() <= 200, "a model's name has not 1 to 200 bytes")?;
    Ok(name)
}

pub(super) fn profile(p: Profile) -> Result<vocabulary::Profile, FrameError> {
    let lists = [p.models.len(), p.offers.len(), p.loading.len(), p.failures.len()];
    sense(KIND, lists.iter().all(|length| *length <= LIST_MAX), "a list is too long")?;
    sense(KIND, p.labels.len() <= LABELS_MAX, "there are too many labels")?;
    let fits = |text: &String| text.len() <= LABEL_BYTES_MAX;
    sense(KIND, p.labels.iter().all(|(n, v)| !n.is_empty() && fits(n) && fits(v)), "a label is too long")?;
    let offer = |o: Offered| {
        let (model, name) = (model(&o.model)?, name(o.name)?);
        Ok(vocabulary::Offered { model, name, weights: o.weights, bytes: o.bytes })
    };
    let loading = |l: Loading| Ok(vocabulary::Loading { model: model(&l.model)?, bytes: l.bytes });
    let failure = |f: FailedLoad| Ok((model(&f.model)?, f.why));
    Ok(vocabulary::Profile {
        name: p.name,
        identity: 0,
        trust: match (p.guest, p.provider) {
            (_, true) => Trust::Provider,
            (true, false) => Trust::Guest,
            (false, false) => Trust::Own,
        },
        labels: p.labels,
        devices: p.devices,
        memory_free: p.memory_free,
        bandwidth: p.bandwidth,
        price: vocabulary::Price { prompt: p.price.prompt, output: p.price.output },
        models: p.models.into_iter().map(held).collect::<Result<_, _>>()?,
        offers: p.offers.into_iter().map(offer).collect::<Result<_, FrameError>>()?,
        loading: p.loading.into_iter().map(loading).collect::<Result<_, FrameError>>()?,
        failures: p.failures.into_iter().map(failure).collect::<Result<_, FrameError>>()?,
        orders: p.orders,
    })
}

fn held(h: Held) -> Result<vocabulary::Held, FrameError> {
    let rate = h.prefill_tokens_per_s;
    sense(KIND, h.slots > 0, "a model has no slots")?;
    sense(KIND, rate.is_finite() && rate > 0.0, "a rate is not above 0")?;
    sense(KIND, h.prefixes.len() <= PREFIXES_MAX, "too many blocks are named")?;
    Ok(vocabulary::Held {
        model: model(&h.model)?,
        name: name(h.name)?,
        text: h.text.map(|text| digest(&text).map(TextId)).transpose()?,
        context: h.context,
        numerics: h.numerics,
        kv: match h.kv {
            Kv::F16 => KvType::F16,
            Kv::Q8_0 => KvType::Q8_0,
        },
        kv_blocks: h.kv_blocks,
        slots: h.slots,
        rates: vocabulary::Rates {
            prefill_tokens_per_s: rate,
            token_time_alone: Duration::from_nanos(h.token_time_alone_ns),
            token_time_full: Duration::from_nanos(h.token_time_full_ns),
        },
        weights: h.weights,
        bytes: h.bytes,
        pinned: h.pinned,
        // Whoever can't is asked by no such link.
        resumes: true,
        grammars: h.grammars,
        prefixes: h.prefixes.iter().map(|key| digest(key).map(BlockKey)).collect::<Result<_, _>>()?,
    })
}
