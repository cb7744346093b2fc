//! Working memory of a program.
use super::super::gemm::{Acts, SUMS};
use super::super::load::{AttendStep, LowStep, Lowered};
use super::super::os::Bytes;
use super::super::pack::BLOCK;
use super::super::simd::LANES;
use super::prepared::TILE;
use crate::program::DeviceError;

/// Rows of logits computed at once.
pub(super) const LOGIT_ROWS: usize = 16;
/// Values of attention that wait to be folded, at most (16 MiB).
pub(super) const PARTIALS: usize = 4 << 20;

/// Working memory, all f32 but for the quantised activations.
pub(super) struct Room {
    /// Two of `[rows][hidden]`: the residual stream before and after its pending sum.
    pub(super) x: [Bytes; 2],
    /// `[rows][hidden]`: the pending sum, and a second product to add to it.
    pub(super) y: [Bytes; 2],
    pub(super) qkv: Bytes,
    pub(super) gate: Bytes,
    pub(super) up: Bytes,
    pub(super) acts: ActsRoom,
    /// One row for each thread.
    pub(super) solo: Vec<ActsRoom>,
    /// Two rows of the residual stream for each thread.
    pub(super) scratch: Vec<Bytes>,
    /// Queries, sums and states of a tile for each thread.
    pub(super) tiles: Vec<Bytes>,
    /// `[row][head][span]` of sum and state.
    pub(super) partials: Bytes,
    pub(super) logits: Bytes,
    /// `[rope][row]` of cosines, then sines.
    pub(super) angles: Vec<Bytes>,
}

pub(super) struct ActsRoom {
    pub(super) f: Bytes,
    pub(super) q: Bytes,
    pub(super) d: Bytes,
    pub(super) sums: Bytes,
}

pub(super) fn bytes(len: usize) -> Result<Bytes, DeviceError> {
    Bytes::zeroed(len).ok_or_else(|| DeviceError::Lost(format!("the system has no {} MiB left", len >> 20)))
}

fn floats(n: usize) -> Result<Bytes, DeviceError> {
    bytes(4 * n + 64)
}

impl ActsRoom {
    fn new(rows: usize, cols: usize) -> Result<ActsRoom, DeviceError> {
        let blocks = rows * cols.div_ceil(BLOCK);
        Ok(ActsRoom {
            f: floats(rows * cols)?,
            q: bytes(rows * cols + 64)?,
            d: floats(blocks)?,
            sums: floats(blocks * SUMS)?,
        })
    }
    pub(super) fn of(&self, cols: usize) -> Acts {
        Acts {
            f: self.f.ptr().cast(),
            q: self.q.ptr().cast(),
            d: self.d.ptr().cast(),
            sums: self.sums.ptr().cast(),
            cols,
        }
    }
}

/// Values of a tile's scratch for one thread: `TILE * group` queries with two sums and two states each.
fn tile_values(queries: usize, head_dim: usize) -> usize {
    queries * (3 * head_dim + 4)
}

impl Room {
    pub(super) fn new(low: &Lowered, threads: usize) -> Result<Room, DeviceError> {
        let rows = low.kv.rows as usize;
        let heads = |f: fn(&AttendStep) -> usize| {
            let steps = low.steps.iter().map(|s| if let LowStep::Attend(a) = s { f(a) } else { 0 });
            steps.max().unwrap_or(0)
        };
        let (group, head_dim) = (heads(|a| a.heads.heads / a.heads.kv_heads), heads(|a| a.heads.head_dim));
        let each = |n: usize| (0..threads).map(|_| floats(n)).collect::<Result<Vec<_>, _>>();
        let pair = |n: usize| Ok::<_, DeviceError>([floats(n)?, floats(n)?]);
        Ok(Room {
            x: pair(rows * low.hidden)?,
            y: pair(rows * low.hidden)?,
            qkv: floats(rows * low.qkv_max)?,
            gate: floats(rows * low.ff_max)?,
            up: floats(rows * low.ff_max)?,
            acts: ActsRoom::new(rows, low.cols_max)?,
            solo: (0..threads).map(|_| ActsRoom::new(1, low.cols_max)).collect::<Result<_, _>>()?,
            scratch: each(2 * low.hidden)?,
            tiles: each(tile_values(TILE * group, head_dim))?,
            partials: floats(PARTIALS)?,
            logits: floats(LOGIT_ROWS * low.vocab.next_multiple_of(LANES))?,
            angles: low
                .ropes
                .iter()
                .map(|r| floats(rows * 2 * r.inv_freq.len()))
                .collect::<Result<_, _>>()?,
        })
    }
}
