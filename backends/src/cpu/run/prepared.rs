//! A batch as threads see it.
use super::super::attend::SPAN;
use crate::program::{Input, Segment, SegmentOutput};
use std::sync::Mutex;

/// Rows of one sequence whose attention is computed together.
pub(super) const TILE: usize = 8;

/// A row of the batch.
pub(super) struct Row {
    pub(super) position: usize,
    pub(super) segment: usize,
}

/// A batch, taken apart once for all threads.
pub(super) struct Prepared<'a> {
    pub(super) segments: &'a [Segment],
    pub(super) rows: Vec<Row>,
    /// By row, where the segment's input is ids.
    pub(super) ids: Vec<u32>,
    /// First row of each segment.
    pub(super) first: Vec<usize>,
    /// Rows whose attention is computed together: first row and how many.
    pub(super) tiles: Vec<(usize, usize)>,
    /// Rows whose logits are wanted.
    pub(super) logit_rows: Vec<usize>,
    /// Spans of the longest sequence.
    pub(super) spans: usize,
    pub(super) outputs: Mutex<Vec<SegmentOutput>>,
}

impl<'a> Prepared<'a> {
    pub(super) fn new(segments: &'a [Segment], hidden: usize, last: &[u32]) -> Prepared<'a> {
        let mut p = Prepared {
            segments,
            rows: Vec::new(),
            ids: Vec::new(),
            first: Vec::new(),
            tiles: Vec::new(),
            logit_rows: Vec::new(),
            spans: 0,
            outputs: Mutex::new(vec![SegmentOutput::Nothing; segments.len()]),
        };
        for (segment, s) in segments.iter().enumerate() {
            let first = p.rows.len();
            let n = match &s.input {
                Input::Ids(ids) => {
                    p.ids.extend(ids);
                    ids.len()
                }
                Input::LastSampled => {
                    p.ids.push(last[s.slot as usize]);
                    1
                }
                Input::Hidden(x) => {
                    p.ids.resize(first + x.len() / hidden, 0);
                    x.len() / hidden
                }
            };
            p.first.push(first);
            p.rows.extend((0..n).map(|i| Row { position: s.start as usize + i, segment }));
            p.tiles.extend((0..n).step_by(TILE).map(|i| (first + i, (n - i).min(TILE))));
            p.spans = p.spans.max((s.start as usize + n).div_ceil(SPAN));
            p.logit_rows.extend(first + n - s.want.rows().min(n)..first + n);
        }
        p
    }

    /// The first row of a segment whose logits are wanted, and how many are.
    pub(super) fn wanted(&self, segment: usize) -> (usize, usize) {
        let end = self.first.get(segment + 1).copied().unwrap_or(self.rows.len());
        let n = self.segments[segment].want.rows().min(end - self.first[segment]);
        (end - n, n)
    }

    pub(super) fn blocks(&self, row: usize) -> &[u32] {
        &self.segments[self.rows[row].segment].blocks
    }
}
