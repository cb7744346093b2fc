//! Golden logits: what llama.cpp computes from an F32 copy of a model, kept small.
//!
//! For every position of a fixed text the [`TOP`] likeliest tokens with their log-probabilities, and the logarithm of
//! the probability that remains. The file, all integers little-endian base-128 varints unless stated:
//!
//! ```text
//! "weirgold1\n"
//! length, UTF-8        how it was made, for a person
//! 32 bytes             SHA-256 of the quantised model file
//! vocab
//! f64, f64             llama.cpp's own mean KL on the quantised file: over these buckets, over the whole vocabulary
//! n, n ids             the text's tokens
//! n rows               TOP times (id, gap), then the tail's gap
//! ```
//! A gap is how far a log-probability lies below the one before it (0 at first), in units of 2^-16. The tail's gap is
//! counted from 0.
use std::fmt;

/// Tokens kept at each position.
pub const TOP: usize = 64;
const MAGIC: &[u8] = b"weirgold1\n";
const UNIT: f64 = 65536.0;
/// Log-probabilities below this are all the same to us.
const FLOOR: f64 = -200.0;

/// Golden logits of one model over one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Golden {
    /// How they were made.
    pub made_by: String,
    /// SHA-256 of the quantised model file.
    pub model: [u8; 32],
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Mean over the positions of KL(F32 copy || llama.cpp's kernels on the quantised file), in nats, over the buckets
    /// that are kept here.
    pub peer_kl: f64,
    /// The same over the whole vocabulary.
    pub peer_kl_whole: f64,
    /// The text; row `i` is the distribution of what follows `tokens[..=i]`.
    pub tokens: Vec<u32>,
    /// One a token.
    pub rows: Vec<Row>,
}

/// The distribution at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Ids and natural log-probabilities, likeliest first.
    pub top: Vec<(u32, f64)>,
    /// Natural logarithm of the probability of all other tokens together.
    pub tail: f64,
}

/// Why a golden file can't be read.
#[derive(Debug, PartialEq)]
pub struct Malformed(&'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a file of golden logits: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

impl Row {
    /// The row that `logits` give.
    pub fn of(logits: &[f32]) -> Row {
        let total = log_sum_exp(logits);
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let descending =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if ids.len() > TOP {
            ids.select_nth_unstable_by(TOP - 1, descending);
        }
        let (kept, rest) = ids.split_at_mut(TOP.min(logits.len()));
        kept.sort_unstable_by(descending);
        let top = kept.iter().map(|&id| (id, f64::from(logits[id as usize]) - total)).collect();
        let tail: f64 = rest.iter().map(|&id| (f64::from(logits[id as usize]) - total).exp()).sum();
        Row { top, tail: tail.ln().max(FLOOR) }
    }

    /// `KL(this || softmax(logits))` in nats over the kept tokens and the tail as one bucket: never more than the KL
    /// over the whole vocabulary.
    pub fn kl(&self, logits: &[f32]) -> f64 {
        let total = log_sum_exp(logits);
        // Rounding of the stored values leaves a mass of not quite 1.
        let mass: f64 = self.top.iter().map(|(_, p)| p.exp()).sum::<f64>() + self.tail.exp();
        let mut kl = 0.0;
        let mut kept = 0.0;
        for &(id, log_p) in &self.top {
            let log_p = log_p - mass.ln();
            let log_q = f64::from(logits[id as usize]) - total;
            kept += log_q.exp();
            kl += log_p.exp() * (log_p - log_q);
        }
        let log_p = self.tail - mass.ln();
        let log_q = (1.0 - kept).max(FLOOR.exp()).ln();
        kl + log_p.exp() * (log_p - log_q)
    }
}

/// `ln(sum(exp(logits)))` in double precision.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + logits.iter().map(|&x| (f64::from(x) - most).exp()).sum::<f64>().ln()
}

impl Golden {
    /// As a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        put(&mut out, self.made_by.len() as u64);
        out.extend_from_slice(self.made_by.as_bytes());
        out.extend_from_slice(&self.model);
        put(&mut out, self.vocab as u64);
        out.extend_from_slice(&self.peer_kl.to_le_bytes());
        out.extend_from_slice(&self.peer_kl_whole.to_le_bytes());
        put(&mut out, self.tokens.len() as u64);
        for &id in &self.tokens {
            put(&mut out, u64::from(id));
        }
        for row in &self.rows {
            let mut last = 0;
            for &(id, log_p) in &row.top {
                let below = (-log_p.max(FLOOR) * UNIT).round().max(0.0) as u64;
                put(&mut out, u64::from(id));
                put(&mut out, below.saturating_sub(last));
                last = below.max(last);
            }
            put(&mut out, (-row.tail.max(FLOOR) * UNIT).round().max(0.0) as u64);
        }
        out
    }

    /// From a file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Golden, Malformed> {
        let mut at = bytes.strip_prefix(MAGIC).ok_or(Malformed("wrong magic"))?;
        let length = get_usize(&mut at)?;
        let made_by =
            std::str::from_utf8(take(&mut at, length)?).map_err(|_| Malformed("text is not UTF-8"))?;
        let made_by = made_by.to_owned();
        let model = array(&mut at)?;
        let vocab = get_usize(&mut at)?;
        let peer_kl = f64::from_le_bytes(array(&mut at)?);
        let peer_kl_whole = f64::from_le_bytes(array(&mut at)?);
        let positions = get_usize(&mut at)?;
        let tokens = (0..positions).map(|_| get_id(&mut at, vocab)).collect::<Result<Vec<u32>, _>>()?;
        let rows = (0..positions).map(|_| row(&mut at, vocab)).collect::<Result<Vec<Row>, _>>()?;
        if !at.is_empty() {
            return Err(Malformed("bytes after the last row"));
        }
        Ok(Golden { made_by, model, vocab, peer_kl, peer_kl_whole, tokens, rows })
    }
}

fn row(at: &mut &[u8], vocab: usize) -> Result<Row, Malformed> {
    let mut below = 0u64;
    let mut top = Vec::with_capacity(TOP);
    for _ in 0..TOP.min(vocab) {
        let id = get_id(at, vocab)?;
        below = below.saturating_add(get(at)?);
        top.push((id, -(below as f64) / UNIT));
    }
    Ok(Row { top, tail: -(get(at)? as f64) / UNIT })
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn get(at: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(at, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Malformed("an endless number"))
}

fn get_usize(at: &mut &[u8]) -> Result<usize, Malformed> {
    usize::try_from(get(at)?).map_err(|_| Malformed("a number out of range"))
}

fn get_id(at: &mut &[u8], vocab: usize) -> Result<u32, Malformed> {
    let id = get(at)?;
    if id < vocab as u64 { Ok(id as u32) } else { Err(Malformed("a token outside the vocabulary")) }
}

fn take<'a>(at: &mut &'a [u8], n: usize) -> Result<&'a [u8], Malformed> {
    let (head, rest) = at.split_at_checked(n).ok_or(Malformed("it ends early"))?;
    *at = rest;
    Ok(head)
}

fn array<const N: usize>(at: &mut &[u8]) -> Result<[u8; N], Malformed> {
    take(at, N)?.try_into().map_err(|_| Malformed("it ends early"))
}
