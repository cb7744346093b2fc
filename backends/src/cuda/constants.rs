//! The constants of generated kernels, as C++.
use super::forms::{Form, Split};
use crate::plan::{Norm, NormKind};

/// Whether a norm can be left to the product that reads it: a gain beforehand, the root as a factor of whole rows.
pub fn fusable(norm: &Norm) -> bool {
    norm.kind == NormKind::Rms && norm.bias.is_none()
}

/// A float as C++ reads it.
pub fn c(v: f32) -> String {
    format!("{v:e}f")
}

/// The constants of a product's kernels, `G` of `gemm.cu`.
#[derive(Clone, Copy, Default)]
pub struct Constants<'a> {
    pub split: Split,
    pub pairs: usize,
    /// `E_RAW` and its like.
    pub kind: u32,
    pub forms: &'a [Form],
    pub rows: &'a [usize],
    pub stride: usize,
    /// Eps and width where the product is divided by the root mean square of the stream.
    pub norm: Option<(f32, usize)>,
    pub act: u8,
    pub map: bool,
    pub cap: f32,
    pub next: u32,
    pub next_pairs: usize,
}

impl Constants<'_> {
    pub fn reading(mut self, norm: &Norm, hidden: usize) -> Self {
        self.norm = fusable(norm).then_some((norm.eps, hidden));
        self
    }

    pub fn text(&self) -> String {
        let form = |i: usize| self.forms.get(i).map_or(0, |f| *f as u32);
        let rows = |i: usize| self.rows.get(i).copied().unwrap_or(0);
        let (eps, hidden) = self.norm.unwrap_or((0.0, 0));
        format!(
            "static constexpr int PAIRS = {}, SEGS = {}, SEG = {}, MT = {}, EPI = {}, COUNT = {}, F0 = {}, F1 = {}, \
             F2 = {}, ROWS0 = {}, ROWS1 = {}, ROWS2 = {}, STRIDE = {}, NORM = {}, MAP = {}, BLOCKS = {}, ACT = {}, FORMS = {}, \
             NEXT_PAIRS = {};\nstatic constexpr float EPS = {}, CAP = {};",
            self.pairs,
            self.split.segs,
            self.split.seg,
            self.split.mt,
            self.kind,
            self.forms.len(),
            form(0),
            form(1),
            form(2),
            rows(0),
            rows(1),
            rows(2),
            self.stride,
            u8::from(self.norm.is_some()),
            u8::from(self.map),
            hidden / 32,
            self.act,
            self.next,
            self.next_pairs,
            c(eps),
            c(self.cap),
        )
    }
}
