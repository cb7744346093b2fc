//! Behind the last layer: logits and the choice of tokens, or the residual stream brought up to date.
use super::{Buf, Call, Height, Lowering};
use crate::program::DeviceError;
use crate::wgpu::kernels::{self, Epilogue, Part, Product};
use crate::wgpu::pack::BLOCK;

/// Ids that a workgroup chooses among.
const CHUNK: usize = 2048;

impl<'a> Lowering<'a> {
    pub(super) fn head(&mut self) -> Result<(), DeviceError> {
        let plan = self.plan;
        let head = &plan.head;
        let mut table = Vec::new();
        if head.linear.weight == plan.embed.table && head.linear.bias.is_none() {
            table = std::mem::take(&mut self.table);
        }
        if table.is_empty() {
            for (region, parts) in self.place(&[vec![&head.linear]])? {
                table.extend(parts.into_iter().map(|part| (region, part)));
            }
        }
        let floating = table[0].1.matrices[0].format.floating();
        let product = |part: &Part, tile| Product {
            parts: vec![part.clone()],
            fused: None,
            epilogue: Epilogue::Logits { width: plan.vocab, cap: None, peaks: 0, first_peak: 0 },
            tile,
        };
        let widths: Vec<usize> = table.iter().map(|(_, part)| product(part, 1).groups()[0]).collect();
        let peaks: usize = widths.iter().sum();
        let mut first_peak = 0;
        let output = [Buf::Logits, Buf::Peaks];
        for (n, ((region, part), width)) in table.iter().zip(&widths).enumerate() {
            let epilogue = Epilogue::Logits { width: plan.vocab, cap: head.soft_cap, peaks, first_peak };
            first_peak += width;
            let tiled = Product { epilogue, ..product(part, self.tile(part)) };
            let prologue = self.prologue(*region, Some(&head.norm), floating, Some(self.out.wanted_at))?;
            let bytes = 4 * self.out.regions[*region].words;
            let [one, many] =
                self.behind_norm(("norm_logits", bytes), (*region, n == 0), tiled, prologue, &output);
            self.out.head_one.extend(one);
            self.out.head_many.extend(many);
        }
        self.grow(Buf::Logits, 4 * plan.vocab * self.out.logits_rows);
        self.grow(Buf::Peaks, 4 * peaks * self.out.logits_rows);
        self.choose(peaks);
        Ok(())
    }

    fn choose(&mut self, peaks: usize) {
        let vocab = self.plan.vocab;
        let chunks = vocab.div_ceil(CHUNK);
        let constants = [
            ("VOCAB", vocab),
            ("OUTS", self.out.wanted_at),
            ("PEAKS", peaks),
            ("CHUNKS", chunks),
            ("CHUNK", CHUNK),
        ];
        for (entry, width) in [("choose", chunks), ("settle", 1)] {
            let kernel = kernels::sample(self.dialect, &constants, entry);
            let buffers = vec![Buf::Logits, Buf::Peaks, Buf::Step, Buf::Candidates, Buf::Last, Buf::Ids];
            self.out.choose.push(Call::new("sample", kernel, buffers, width, Height::Rows));
        }
        self.grow(Buf::Candidates, 8 * chunks * self.out.logits_rows);
    }

    pub(super) fn settle(&mut self) -> Result<(), DeviceError> {
        if !self.pending.is_empty() {
            let region = self.region();
            let prologue = self.prologue(region, None, true, None)?;
            let kernel = prologue.kernel(self.dialect, self.plan.hidden.next_multiple_of(BLOCK));
            let buffers = self.prologue_buffers(region, &prologue, true);
            self.out.settle.push(Call::new("settle", kernel, buffers, 1, Height::Rows));
            self.x = 1 - self.x;
        }
        self.out.x_end = self.x;
        Ok(())
    }
}
