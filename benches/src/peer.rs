//! llama.cpp as a peer: the same file, the same threads, its own defaults.
use crate::workload::{OUTPUT, PREFILL, PROMPT, STREAM_OUTPUT, STREAMS, Side, Workload, token};
use anyhow::{Context as _, Result, bail};
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::{KvCacheType, LlamaContextParams};
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, CString};
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Instant;

/// llama.cpp, initialised. At most one in a process.
pub struct Peer(LlamaBackend);

/// A model that llama.cpp has loaded.
pub struct PeerModel<'a> {
    peer: &'a Peer,
    model: LlamaModel,
}

/// What a context of llama.cpp is made for.
#[derive(Clone, Copy, Debug)]
pub struct ContextSpec {
    /// Tokens of context, over all sequences.
    pub context: u32,
    /// Most tokens in one batch; also the physical batch where it is smaller than 512.
    pub batch: u32,
    /// Tokens computed at once.
    pub ubatch: u32,
    /// Sequences.
    pub sequences: u32,
    /// Threads.
    pub threads: i32,
    /// F32 keys and values and no flash attention: for golden logits. Else its defaults.
    pub exact: bool,
}

impl Peer {
    /// Starts llama.cpp, silently. Fails if it was built without the vector instructions that this machine has: such a
    /// build would flatter us.
    pub fn start() -> Result<Peer> {
        let mut backend = LlamaBackend::init()?;
        backend.void_logs();
        let peer = Peer(backend);
        peer.check_native()?;
        Ok(peer)
    }

    /// The instruction sets and options it was built with.
    pub fn system_info(&self) -> String {
        // SAFETY: it returns a pointer to a static, NUL-terminated string.
        unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().into_owned()
    }

    #[cfg(target_arch = "x86_64")]
    fn check_native(&self) -> Result<()> {
        let info = self.system_info();
        let needed = [
            ("AVX2", std::is_x86_feature_detected!("avx2")),
            ("FMA", std::is_x86_feature_detected!("fma")),
            ("AVX512", std::is_x86_feature_detected!("avx512f")),
            ("AVX512_VNNI", std::is_x86_feature_detected!("avx512vnni")),
            ("AVX512_BF16", std::is_x86_feature_detected!("avx512bf16")),
        ];
        for (name, here) in needed {
            if here && !info.contains(&format!("{name} = 1")) {
                bail!(
                    "llama.cpp was built without {name}, which this processor has ({info}); build through \
                     `cargo xtask bench cpu`, which sets CFLAGS and CXXFLAGS to -march=native"
                );
            }
        }
        Ok(())
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn check_native(&self) -> Result<()> {
        Ok(())
    }

    /// Loads a model, weights and all.
    pub fn load(&self, path: &Path) -> Result<PeerModel<'_>> {
        self.load_with(path, LlamaModelParams::default())
    }

    /// Loads only a model's vocabulary.
    pub fn load_vocabulary(&self, path: &Path) -> Result<PeerModel<'_>> {
        self.load_with(path, LlamaModelParams::default().with_vocab_only(true))
    }

    fn load_with(&self, path: &Path, params: LlamaModelParams) -> Result<PeerModel<'_>> {
        let model = LlamaModel::load_from_file(&self.0, path, &params)
            .with_context(|| format!("llama.cpp can't load {}", path.display()))?;
        Ok(PeerModel { peer: self, model })
    }

    /// Writes a copy of `from` with every matrix widened to F32.
    pub fn widen(&self, from: &Path, to: &Path, threads: i32) -> Result<()> {
        let c_from = CString::new(from.to_str().context("path is not UTF-8")?)?;
        let c_to = CString::new(to.to_str().context("path is not UTF-8")?)?;
        // SAFETY: plain data, returned by value.
        let mut params = unsafe { sys::llama_model_quantize_default_params() };
        params.ftype = sys::LLAMA_FTYPE_ALL_F32;
        params.allow_requantize = true;
        params.nthread = threads;
        // SAFETY: both strings and the parameters outlive the call; null pointers inside the parameters mean "none".
        let code = unsafe { sys::llama_model_quantize(c_from.as_ptr(), c_to.as_ptr(), &params) };
        if code != 0 {
            bail!("llama.cpp could not write an F32 copy of {} (code {code})", from.display());
        }
        Ok(())
    }
}

impl PeerModel<'_> {
    /// Token ids of `text` without beginning-of-text; `special`: names of special tokens in the text become them.
    pub fn tokenize(&self, text: &str, add_special: bool, special: bool) -> Vec<u32> {
        self.model
            .vocab()
            .tokenize(text.as_bytes(), add_special, special)
            .iter()
            .map(|t| t.0 as u32)
            .collect()
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.model.n_vocab().max(0) as usize
    }

    /// A context to run batches in.
    pub fn context(&self, spec: ContextSpec) -> Result<PeerContext<'_>> {
        let mut params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(spec.context))
            .with_n_batch(spec.batch)
            .with_n_ubatch(spec.ubatch)
            .with_n_seq_max(spec.sequences)
            .with_n_threads(spec.threads)
            .with_n_threads_batch(spec.threads)
            .with_no_perf(true);
        if spec.exact {
            params = params
                .with_type_k(KvCacheType::F32)
                .with_type_v(KvCacheType::F32)
                .with_flash_attention_policy(sys::LLAMA_FLASH_ATTN_TYPE_DISABLED);
        }
        let context =
            self.model.new_context(&self.peer.0, params).context("llama.cpp can't make a context")?;
        let batch = LlamaBatch::new(spec.batch as usize, 1);
        Ok(PeerContext { context, batch })
    }
}

/// A KV cache and the buffers to compute with.
pub struct PeerContext<'a> {
    context: LlamaContext<'a>,
    batch: LlamaBatch<'static>,
}

/// A token at a position of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct PeerRow {
    /// Token id.
    pub id: u32,
    /// Its position.
    pub position: u32,
    /// Its sequence.
    pub sequence: u32,
    /// Compute its logits.
    pub logits: bool,
}

impl PeerContext<'_> {
    /// Computes one batch and waits for it.
    pub fn decode(&mut self, rows: impl IntoIterator<Item = PeerRow>) -> Result<()> {
        self.batch.clear();
        for row in rows {
            let id = LlamaToken(row.id as i32);
            self.batch.add(id, row.position as i32, &[row.sequence as i32], row.logits)?;
        }
        self.context.decode(&mut self.batch)?;
        self.context.synchronize();
        Ok(())
    }

    /// `[vocab]` logits of row `row` of the last batch, which asked for them.
    pub fn logits(&self, row: usize) -> &[f32] {
        self.context.get_logits_ith(row as i32)
    }

    /// Forgets every sequence.
    pub fn clear(&mut self) {
        self.context.clear_kv_cache();
    }
}

/// llama.cpp running the workloads, each in a context of its own, as llama-bench and llama-batched-bench do: the next
/// token is not chosen by its logits but given.
pub struct PeerSide<'a> {
    vocab: usize,
    single: PeerContext<'a>,
    streams: PeerContext<'a>,
}

impl<'a> PeerSide<'a> {
    /// Contexts for `threads` threads.
    pub fn new(model: &'a PeerModel<'_>, threads: usize) -> Result<PeerSide<'a>> {
        let threads = i32::try_from(threads)?;
        let single = ContextSpec {
            context: PREFILL,
            batch: PREFILL,
            ubatch: PREFILL,
            sequences: 1,
            threads,
            exact: false,
        };
        let context = STREAMS * (PROMPT + STREAM_OUTPUT).next_multiple_of(256);
        let streams = ContextSpec { context, sequences: STREAMS, ..single };
        let vocab = model.vocab();
        Ok(PeerSide { vocab, single: model.context(single)?, streams: model.context(streams)? })
    }
}

fn generate(context: &mut PeerContext<'_>, vocab: usize, streams: u32, output: u32) -> Result<f64> {
    context.clear();
    for sequence in 0..streams {
        context.prompt(vocab, sequence, PROMPT)?;
    }
    let began = Instant::now();
    for position in PROMPT..PROMPT + output {
        context.decode((0..streams).map(|sequence| {
            let id = token(position + 31 * sequence, vocab);
            PeerRow { id, position, sequence, logits: true }
        }))?;
    }
    Ok(f64::from(streams * output) / began.elapsed().as_secs_f64())
}

impl PeerContext<'_> {
    fn prompt(&mut self, vocab: usize, sequence: u32, length: u32) -> Result<()> {
        self.decode((0..length).map(|position| {
            let id = token(position + 31 * sequence, vocab);
            PeerRow { id, position, sequence, logits: position + 1 == length }
        }))
    }
}

impl Side for PeerSide<'_> {
    fn run(&mut self, workload: Workload) -> Result<f64> {
        match workload {
            Workload::Decode => generate(&mut self.single, self.vocab, 1, OUTPUT),
            Workload::Streams => generate(&mut self.streams, self.vocab, STREAMS, STREAM_OUTPUT),
            Workload::Prefill => {
                self.single.clear();
                let began = Instant::now();
                self.single.prompt(self.vocab, 0, PREFILL)?;
                Ok(f64::from(PREFILL) / began.elapsed().as_secs_f64())
            }
        }
    }
}
