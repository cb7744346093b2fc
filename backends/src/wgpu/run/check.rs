//! What a batch must keep to.
use super::WgpuProgram;
use crate::program::{Batch, Input, Segment, Want};
use weir_scheduler::BLOCK_TOKENS;

impl WgpuProgram {
    /// What the caller guarantees, and that this range of layers can take the input and give what is wanted.
    pub(super) fn check(&self, batch: &Batch) -> Result<(), String> {
        let embeds = !self.embed.is_empty();
        let heads = !self.head_one.is_empty();
        let mut all = 0;
        let mut seen = vec![false; self.sampled.len()];
        for segment in &batch.segments {
            let n = self.rows(segment);
            all += n;
            let slot = segment.slot as usize;
            match seen.get_mut(slot) {
                None => return Err(format!("slot {slot} of {}", self.sampled.len())),
                Some(true) => return Err(format!("slot {slot} is there twice")),
                Some(seen) => *seen = true,
            }
            let input_fits = match &segment.input {
                Input::Ids(ids) => embeds && ids.iter().all(|&id| (id as usize) < self.lowered.vocab),
                Input::LastSampled => embeds && heads && self.sampled[slot],
                Input::Hidden(x) => !embeds && x.len() % self.lowered.hidden == 0,
            };
            let want_fits = match &segment.want {
                Want::Nothing => true,
                Want::Sample(_) => heads,
                Want::Logits(last) => heads && *last as usize <= n,
                Want::Hidden => !heads,
            };
            if n == 0 || !input_fits || !want_fits {
                return Err(format!("slot {slot}: {n} rows of input that these layers can't take or answer"));
            }
            let end = segment.start as usize + n;
            if end > segment.blocks.len() * BLOCK_TOKENS
                || end > self.kv.blocks as usize * BLOCK_TOKENS
                || segment.blocks.iter().any(|&block| block >= self.kv.blocks)
            {
                return Err(format!("slot {slot}: its blocks don't hold {end} positions"));
            }
        }
        if all > self.kv.rows as usize {
            return Err(format!("{all} rows in a batch of at most {}", self.kv.rows));
        }
        Ok(())
    }

    pub(super) fn rows(&self, segment: &Segment) -> usize {
        match &segment.input {
            Input::Ids(ids) => ids.len(),
            Input::LastSampled => 1,
            Input::Hidden(x) => x.len() / self.lowered.hidden,
        }
    }
}
