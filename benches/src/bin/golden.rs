//! Makes what tests compare with, by llama.cpp: golden logits from an F32 copy of a model, and token ids.
//!
//! ```text
//! golden logits --model M.gguf --text FILE --positions N --out FILE [--threads N] [--scratch DIR]
//! golden tokens --model M.gguf --corpus CORPUS.json --out IDS.json
//! golden show FILE
//! ```
//! `tokens` reads a JSON array of strings and writes, for each, `{"plain": [...], "special": [...]}`: its ids with names
//! of special tokens taken as text, and taken as special tokens. Neither adds a beginning-of-text token.
use anyhow::{Context as _, Result, bail};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use weir_benches::peer::{ContextSpec, Peer, PeerContext, PeerModel, PeerRow};

#[path = "../../../backends/tests/golden/logits.rs"]
mod logits;
use logits::{Golden, Row, log_sum_exp};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let arguments: Vec<String> = arguments.collect();
    if command == "show" {
        return show(arguments.first().context("golden show FILE")?);
    }
    let flags = flags(&arguments)?;
    let flag = |name: &str| flags.get(name).copied();
    let needed = |name: &str| flag(name).with_context(|| format!("--{name} is missing"));
    match command.as_str() {
        "tokens" => tokens(Path::new(needed("model")?), Path::new(needed("corpus")?), needed("out")?),
        "logits" => {
            let job = Job {
                model: Path::new(needed("model")?),
                text: std::fs::read_to_string(needed("text")?)?,
                positions: needed("positions")?.parse()?,
                threads: flag("threads").unwrap_or("2").parse()?,
                scratch: Path::new(flag("scratch").unwrap_or("target")),
            };
            let golden = job.run()?;
            std::fs::write(needed("out")?, golden.to_bytes())?;
            Ok(())
        }
        _ => bail!("golden logits|tokens|show; see the head of benches/src/bin/golden.rs"),
    }
}

fn flags(arguments: &[String]) -> Result<HashMap<&str, &str>> {
    arguments
        .chunks(2)
        .map(|pair| match pair {
            [name, value] if name.starts_with("--") => Ok((&name[2..], value.as_str())),
            _ => bail!("{} is not `--flag value`", pair.join(" ")),
        })
        .collect()
}

/// Token ids of every string of a corpus.
fn tokens(model: &Path, corpus: &Path, out: &str) -> Result<()> {
    let corpus: Vec<String> =
        serde_json::from_slice(&std::fs::read(corpus)?).context("not an array of strings")?;
    let peer = Peer::start()?;
    let model = peer.load_vocabulary(model)?;
    let rows: Vec<_> = corpus
        .iter()
        .map(|text| {
            let (plain, special) = (model.tokenize(text, false, false), model.tokenize(text, false, true));
            serde_json::json!({ "plain": plain, "special": special })
        })
        .collect();
    std::fs::write(out, serde_json::to_vec(&rows)?)?;
    eprintln!("{} strings", rows.len());
    Ok(())
}

/// One file of golden logits to be made.
struct Job<'a> {
    model: &'a Path,
    text: String,
    positions: usize,
    threads: i32,
    scratch: &'a Path,
}

impl Job<'_> {
    fn run(&self) -> Result<Golden> {
        let wide_path = self.scratch.join(format!("golden-{}.f32.gguf", std::process::id()));
        let peer = Peer::start()?;
        peer.widen(self.model, &wide_path, self.threads)?;
        let golden = self.compare(&peer, &wide_path);
        std::fs::remove_file(&wide_path)?;
        golden
    }

    fn compare(&self, peer: &Peer, wide_path: &Path) -> Result<Golden> {
        let (wide, shipped) = (peer.load(wide_path)?, peer.load(self.model)?);
        let mut tokens = wide.tokenize(&self.text, true, false);
        if tokens.len() < self.positions {
            bail!("the text has only {} tokens", tokens.len());
        }
        tokens.truncate(self.positions);
        let exact = evaluate(&wide, &tokens, self.threads, true)?;
        let own = evaluate(&shipped, &tokens, self.threads, false)?;
        let rows: Vec<Row> = (0..tokens.len()).map(|at| Row::of(exact.logits(at))).collect();
        let (mut kl, mut kl_whole, mut same) = (0.0, 0.0, 0);
        for (at, row) in rows.iter().enumerate() {
            kl += row.kl(own.logits(at));
            kl_whole += whole_kl(exact.logits(at), own.logits(at));
            same += usize::from(Row::of(own.logits(at)).top[0].0 == row.top[0].0);
        }
        let n = tokens.len() as f64;
        eprintln!("llama.cpp's own mean KL: {:.3e} over the buckets, {:.3e} whole", kl / n, kl_whole / n);
        eprintln!("same likeliest token at {same} of {n} positions");
        let made_by = format!(
            "llama-cpp-2 0.1.160; F32 copy (llama_model_quantize, ALL_F32), f32 KV, no flash attention, one batch of \
             {n}; its own KL with its defaults (f16 KV), one batch"
        );
        Ok(Golden {
            made_by,
            model: sha256(self.model)?,
            vocab: wide.vocab(),
            peer_kl: kl / n,
            peer_kl_whole: kl_whole / n,
            tokens,
            rows,
        })
    }
}

/// Logits of every position, from one batch.
fn evaluate<'a>(
    model: &'a PeerModel<'_>,
    tokens: &[u32],
    threads: i32,
    exact: bool,
) -> Result<PeerContext<'a>> {
    let n = tokens.len() as u32;
    let mut context =
        model.context(ContextSpec { context: n, batch: n, ubatch: n, sequences: 1, threads, exact })?;
    context.decode((0..n).zip(tokens).map(|(position, &id)| PeerRow {
        id,
        position,
        sequence: 0,
        logits: true,
    }))?;
    Ok(context)
}

fn whole_kl(p: &[f32], q: &[f32]) -> f64 {
    let (of_p, of_q) = (log_sum_exp(p), log_sum_exp(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - of_p, f64::from(q) - of_q);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

fn sha256(path: &Path) -> Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&buffer[..n]);
    }
}

/// What a golden file says of itself.
fn show(path: &str) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let golden = Golden::from_bytes(&bytes)?;
    println!("{}", golden.made_by);
    println!("model    {}", golden.model.iter().map(|b| format!("{b:02x}")).collect::<String>());
    println!("bytes    {}, positions {}, vocabulary {}", bytes.len(), golden.rows.len(), golden.vocab);
    println!("peer KL  {:.4e} over the buckets, {:.4e} whole", golden.peer_kl, golden.peer_kl_whole);
    Ok(())
}
