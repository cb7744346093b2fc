//! Where tensors lie in the regions of the weights.
use super::{Fill, Lowering, Region, unsupported};
use crate::gguf::{GgmlType, TensorInfo};
use crate::plan::{Linear, Norm};
use crate::program::DeviceError;
use crate::wgpu::kernels::{Matrix, NormAt, Part};
use crate::wgpu::pack::{BLOCK, Format};
use std::ops::Range;

impl<'a> Lowering<'a> {
    pub(super) fn tensor(&self, name: &str) -> Result<&'a TensorInfo, DeviceError> {
        self.file.tensor(name).ok_or_else(|| unsupported(format!("the file has no tensor {name}")))
    }

    pub(super) fn region(&mut self) -> usize {
        self.out.regions.push(Region::default());
        self.out.regions.len() - 1
    }

    pub(super) fn vector(
        &mut self,
        region: usize,
        name: &str,
        values: Range<usize>,
    ) -> Result<usize, DeviceError> {
        if self.tensor(name)?.values() < values.end as u64 {
            return Err(unsupported(format!("tensor {name} has fewer than {} values", values.end)));
        }
        let region = &mut self.out.regions[region];
        let at = region.words;
        region.words = (at + values.len()).next_multiple_of(4);
        region.fills.push(Fill::Vector { tensor: name.into(), values, at });
        Ok(at)
    }

    pub(super) fn norm(&mut self, region: usize, norm: &Norm, width: usize) -> Result<NormAt, DeviceError> {
        let weight = self.vector(region, &norm.weight, 0..width)?;
        let bias = norm.bias.as_ref().map(|bias| self.vector(region, bias, 0..width)).transpose()?;
        Ok(NormAt { kind: norm.kind, weight, bias, eps: norm.eps })
    }

    /// The format of a matrix; as f32 where others of its step are floating and it isn't.
    pub(super) fn format(
        &self,
        linear: &Linear,
        step: &[&Linear],
    ) -> Result<(GgmlType, Format), DeviceError> {
        let of = |linear: &Linear| -> Result<(GgmlType, Format), DeviceError> {
            let info = self.tensor(&linear.weight)?;
            let format = Format::of(info.ty).filter(|_| linear.cols.is_multiple_of(info.ty.block_values()));
            let format = format.ok_or_else(|| {
                unsupported(format!(
                    "tensor {} has type {}, which the GPU can't compute",
                    linear.weight, info.ty
                ))
            })?;
            if info.dims != [linear.cols as u64, linear.rows as u64] {
                let (name, dims) = (&linear.weight, &info.dims);
                return Err(unsupported(format!(
                    "tensor {name} is {dims:?}, expected [{}, {}]",
                    linear.cols, linear.rows
                )));
            }
            Ok((info.ty, format))
        };
        let (ty, format) = of(linear)?;
        for other in step {
            let blocks = of(other)?.1.block();
            if blocks != format.block() {
                return Ok((ty, Format::F32));
            }
        }
        Ok((ty, format))
    }

    /// Rows of a matrix into a region.
    fn matrix(
        &mut self,
        region: usize,
        linear: &Linear,
        (ty, format): (GgmlType, Format),
        rows: Range<usize>,
    ) -> Result<Matrix, DeviceError> {
        let cols = linear.cols.next_multiple_of(BLOCK);
        let words = format.row_words(cols);
        let count = rows.len();
        let place = &mut self.out.regions[region].words;
        let mut take = |words: usize| {
            let at = *place;
            *place = (at + words * count).next_multiple_of(4);
            at
        };
        let (codes, high) = (take(words.codes), take(words.high));
        let (scales, supers) = (take(words.scales), take(words.supers));
        let bias = linear.bias.as_ref().map(|bias| self.vector(region, bias, rows.clone())).transpose()?;
        let matrix = Matrix { format, rows: count, cols, codes, high, scales, supers, bias };
        let fill = Fill::Matrix {
            tensor: linear.weight.clone(),
            ty,
            rows,
            cols: linear.cols,
            matrix: matrix.clone(),
        };
        self.out.regions[region].fills.push(fill);
        Ok(matrix)
    }

    /// Places a step's matrices in as few regions as bindings allow, each group of them cut at the same rows.
    pub(super) fn place(&mut self, groups: &[Vec<&Linear>]) -> Result<Vec<(usize, Vec<Part>)>, DeviceError> {
        let all: Vec<&Linear> = groups.iter().flatten().copied().collect();
        // Vectors need some room too.
        let room = self.limit / 4 - self.limit / 64;
        let mut placed: Vec<(usize, Vec<Part>)> = Vec::new();
        let mut first = 0;
        for group in groups {
            let mut formats = Vec::new();
            let mut row_words = 0;
            for linear in group {
                let format = self.format(linear, &all)?;
                row_words += format.1.row_words(linear.cols.next_multiple_of(BLOCK)).sum() + 1;
                formats.push(format);
            }
            let rows = group[0].rows;
            let mut done = 0;
            while done < rows {
                let used = placed.last().map_or(room, |(region, _)| self.out.regions[*region].words);
                let mut fits = (room.saturating_sub(used) / row_words).min(rows - done);
                if fits < rows - done {
                    fits = fits / 256 * 256;
                }
                if fits == 0 {
                    if room / row_words < 256.min(rows - done) {
                        return Err(unsupported(format!("{}: its rows are too wide", group[0].weight)));
                    }
                    placed.push((self.region(), Vec::new()));
                    continue;
                }
                let Some((region, parts)) = placed.last_mut() else { continue };
                let region = *region;
                let mut matrices = Vec::new();
                for (linear, format) in group.iter().zip(&formats) {
                    matrices.push(self.matrix(region, linear, *format, done..done + fits)?);
                }
                parts.push(Part { matrices, first: first + done });
                done += fits;
            }
            first += rows;
        }
        Ok(placed)
    }
}
