//! Products, behind a norm or with their input ready.
use super::{Buf, Call, Height, Lowering};
use crate::plan::{Linear, Norm};
use crate::program::DeviceError;
use crate::wgpu::kernels::{Epilogue, Part, Product, Prologue};
use crate::wgpu::pack::Codes;

/// Rows of a batch that a workgroup computes when there is more than one.
const TILE: usize = 8;

/// Where a product's input comes from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// The residual stream, normalised.
    Norm(&'a Norm),
    /// Codes and scales that an earlier dispatch leaves.
    Ready([Buf; 2]),
}

impl<'a> Lowering<'a> {
    /// The dispatches of one product.
    pub(super) fn product(
        &mut self,
        name: &'static str,
        source: Source<'a>,
        groups: &[Vec<&Linear>],
        epilogue: Epilogue,
        output: &[Buf],
    ) -> Result<(), DeviceError> {
        let placed = self.place(groups)?;
        let floating = placed[0].1[0].matrices[0].format.floating();
        for (n, (region, parts)) in placed.into_iter().enumerate() {
            let bytes = 4 * self.out.regions[region].words;
            let tile = self.tile(&parts[0]);
            let tiled = Product { parts, fused: None, epilogue: epilogue.clone(), tile };
            match source {
                Source::Norm(norm) => {
                    let prologue = self.prologue(region, Some(norm), floating, None)?;
                    let [one, many] =
                        self.behind_norm((name, bytes), (region, n == 0), tiled, prologue, output);
                    self.out.one.extend(one);
                    self.out.many.extend(many);
                }
                Source::Ready(input) => {
                    let buffers = [&[Buf::Region(region); 2], &input, output].concat();
                    let single = Product { tile: 1, ..tiled.clone() };
                    self.out.one.push(self.call((name, bytes), &single, buffers.clone(), Height::One));
                    self.out.many.push(self.call((name, bytes), &tiled, buffers, Height::Tiles));
                }
            }
        }
        if matches!(source, Source::Norm(_)) && !self.pending.is_empty() {
            self.pending.clear();
            self.x = 1 - self.x;
        }
        Ok(())
    }

    fn call(
        &self,
        (name, bytes): (&'static str, usize),
        product: &Product,
        buffers: Vec<Buf>,
        height: Height,
    ) -> Call {
        let width = product.width();
        Call {
            bytes,
            tile: product.tile,
            ..Call::new(name, product.kernel(self.dialect), buffers, width, height)
        }
    }

    /// The dispatches for one row and for several of a product in that region, which may be the first of those that
    /// share the norm. One row is normalised by each workgroup, where the memory of workgroups allows that.
    pub(super) fn behind_norm(
        &mut self,
        (name, bytes): (&'static str, usize),
        (region, first): (usize, bool),
        tiled: Product,
        prologue: Prologue,
        output: &[Buf],
    ) -> [Vec<Call>; 2] {
        let cols = tiled.parts[0].matrices[0].cols;
        let normed = [Buf::Normed, Buf::NormedScales];
        self.input_buffers(normed, cols, prologue.floating);
        let alone = self.prologue_buffers(region, &prologue, true);
        let before = Call::new(name, prologue.kernel(self.dialect, cols), alone, 1, Height::Rows);
        let before = first.then_some(before);
        let ready = [&[Buf::Region(region); 2], &normed, output].concat();
        let many = self.call((name, bytes), &tiled, ready.clone(), Height::Tiles);
        let inputs = self.prologue_buffers(region, &prologue, false);
        let single = Product { tile: 1, ..tiled };
        let fused = Product { fused: Some(prologue), ..single.clone() };
        let one = if fused.shared_bytes(self.dialect) <= self.dialect.shared_bytes as usize {
            vec![self.call((name, bytes), &fused, [&inputs[..], output].concat(), Height::One)]
        } else {
            let single = self.call((name, bytes), &single, ready, Height::One);
            before.clone().into_iter().chain([single]).collect()
        };
        [one, before.into_iter().chain([many]).collect()]
    }

    /// Rows of the batch that a workgroup computes with these matrices.
    pub(super) fn tile(&self, part: &Part) -> usize {
        // Codes of a byte take twice the registers. With few lanes that shuffle, the partial sums of a tile take too much of the workgroup's memory, and programs
        // that imitate a GPU take long to compile it.
        match self.dialect.lanes {
            32.. if part.matrices[0].format.codes != Codes::N8 => TILE,
            4.. => TILE / 2,
            _ => 1,
        }
    }

    pub(super) fn prologue(
        &mut self,
        region: usize,
        norm: Option<&Norm>,
        floating: bool,
        wanted: Option<usize>,
    ) -> Result<Prologue, DeviceError> {
        let hidden = self.plan.hidden;
        let mut pending = Vec::new();
        for norm in self.pending.clone() {
            pending.push(self.norm(region, norm, hidden)?);
        }
        let norm = norm.map(|norm| self.norm(region, norm, hidden)).transpose()?;
        Ok(Prologue { hidden, rows_max: self.out.rows_max, pending, norm, floating, wanted })
    }

    pub(super) fn prologue_buffers(&self, region: usize, prologue: &Prologue, alone: bool) -> Vec<Buf> {
        let mut buffers = vec![Buf::Region(region), Buf::Region(region), Buf::X(self.x)];
        if !prologue.pending.is_empty() {
            buffers.extend([Buf::Deltas, Buf::X(1 - self.x)]);
        }
        buffers.extend(prologue.wanted.map(|_| Buf::Step));
        if alone && prologue.norm.is_some() {
            buffers.extend([Buf::Normed, Buf::NormedScales]);
        }
        buffers
    }
}
