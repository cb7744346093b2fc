//! How fast a model's file gets from the system's cache to a GPU, and how long a process takes to its first token.
use anyhow::{Context as _, Result, ensure};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use weir_backends::cuda::Cuda;
use weir_backends::gguf::ModelFile;
use weir_backends::load::{LoadOptions, kv_layout, text};
use weir_backends::models;
use weir_backends::program::{Batch, Device, Input, KvLayout, SampleSpec, Segment, Want};
use weir_scheduler::{KvType, Sampling};

/// The flag that makes the bench the process whose time to the first token is taken.
pub const FIRST_TOKEN: &str = "--first-token";
/// Loads in one process, of which the best counts; a first one finds kernels and pinned memory unmade.
const LOADS: usize = 3;
/// Bytes that a thread asks for at once.
const CHUNK: u64 = 2 << 20;

/// A file of random weights that goes when this does.
pub struct Made {
    _folder: tempfile::TempDir,
    /// Where it is.
    pub path: PathBuf,
}

/// Writes a model's bytes where the system keeps temporary files, and so into its cache.
pub fn made(name: &str, bytes: &[u8]) -> Result<Made> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(format!("{name}.gguf"));
    std::fs::File::create(&path)?.write_all(bytes)?;
    Ok(Made { _folder: folder, path })
}

/// Bytes a second at which `threads` threads read a file into memory of their own.
fn read_bytes_per_s(path: &Path, threads: usize) -> Result<f64> {
    let file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let next = AtomicU64::new(0);
    let work = || -> Result<()> {
        let mut buffers = [vec![0u8; CHUNK as usize], vec![1u8; CHUNK as usize]];
        for turn in 0.. {
            let at = next.fetch_add(CHUNK, Ordering::Relaxed);
            if at >= length {
                break;
            }
            let to = &mut buffers[turn % 2][..CHUNK.min(length - at) as usize];
            #[cfg(unix)]
            std::os::unix::fs::FileExt::read_exact_at(&file, to, at)?;
            #[cfg(not(unix))]
            let _ = to;
        }
        Ok(())
    };
    let began = Instant::now();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or(Ok(())))
    })?;
    Ok(length as f64 / began.elapsed().as_secs_f64())
}

/// Prints how fast the file in `path` is loaded, beside what reading it and copying to the GPU allow.
pub fn report(gpu: &Cuda, path: &Path, label: &str) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // once to bring it into the cache
    read_bytes_per_s(path, threads)?;
    let (one, all) = (read_bytes_per_s(path, 1)? / 1e9, read_bytes_per_s(path, threads)? / 1e9);
    let bus = gpu.upload_bytes_per_s()? / 1e9;
    println!(
        "{label:<12} from the file's cache: {one:.1} GB/s by one thread, {all:.1} by {threads}; pinned memory to GPU {bus:.1} GB/s"
    );
    let file = ModelFile::open(path)?;
    let plan = models::plan(&file)?;
    let layout = KvLayout { blocks: 64, kv: KvType::F16, slots: 4, rows: 512 };
    let mut best: Option<f64> = None;
    for turn in 1..=LOADS {
        let began = Instant::now();
        drop(gpu.compile(&file, &plan, 0..plan.layers.len(), layout)?);
        let took = began.elapsed().as_secs_f64();
        let times = gpu.load_times();
        let (bytes, ms) = (times.bytes as f64 / 1e9, |d: std::time::Duration| d.as_secs_f64() * 1e3);
        let (whole, weights) = (bytes / times.total.as_secs_f64(), bytes / times.weights.as_secs_f64());
        println!(
            "{label:<12} load {turn}: {bytes:.2} GB in {:.0} ms and dropped by {:.0} ms, {whole:.1} GB/s ({:.0}% of the bus); \
             weights alone {:.0} ms, {weights:.1} GB/s ({:.0}%); memory {:.0} ms, packing kernel {:.0} ms, kernels beside it {:.0} ms",
            ms(times.total),
            took * 1e3,
            100.0 * whole / bus,
            ms(times.weights),
            100.0 * weights / bus,
            ms(times.memory),
            ms(times.pack),
            ms(times.kernels),
        );
        if best.is_none_or(|b| b < whole) {
            best = Some(whole);
        }
    }
    for turn in 1..=2 {
        let began = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .arg(FIRST_TOKEN)
            .arg(path)
            .stdout(Stdio::piped())
            .spawn()
            .context("this bench could not start itself")?;
        let mut token = [0u8; 1];
        let mut out = child.stdout.take().context("no pipe")?;
        out.read_exact(&mut token).context("the process gave no token")?;
        let took = began.elapsed().as_secs_f64();
        let mut rest = String::new();
        out.read_to_string(&mut rest)?;
        ensure!(child.wait()?.success(), "the process that loads failed");
        println!("{label:<12} process {turn}: first token after {:.0} ms ({})", took * 1e3, rest.trim());
    }
    if let Some(best) = best {
        println!(
            "{label:<12} load           {best:>10.1} GB/s {:>7.1}% of {bus:.1} GB/s",
            100.0 * best / bus
        );
    }
    Ok(())
}

/// What the process does whose time is taken: loads `path` as a node would, asks for a token, and says a byte once it is
/// there, then what took how long.
pub fn first_token(path: &Path) -> Result<()> {
    let began = Instant::now();
    let gpu = Cuda::all().map_err(anyhow::Error::msg)?.into_iter().next().context("no GPU")?;
    let opened = began.elapsed();
    let file = ModelFile::open(path)?;
    let plan = models::plan(&file)?;
    let (layout, _) = kv_layout(&file, &plan, LoadOptions::default(), gpu.describe().memory_free);
    let program = std::thread::scope(|scope| {
        // random weights come without a tokenizer
        let text = scope.spawn(|| text(&file, &plan).is_ok());
        let program = gpu.compile(&file, &plan, 0..plan.layers.len(), layout);
        _ = text.join();
        program
    });
    let (mut program, loaded) = (program?, began.elapsed());
    let ids: Vec<u32> = (1..17).map(|i| i * 7 % plan.vocab as u32).collect();
    let sampling = Arc::new(Sampling { temperature: 0.0, ..Sampling::default() });
    let position = ids.len() as u32;
    let want = Want::Sample(vec![SampleSpec { sampling, position, counts: Vec::new(), mask: None }]);
    let blocks = Arc::new([0]);
    let segment = Segment { slot: 0, start: 0, prompt: true, input: Input::Ids(ids), blocks, want };
    program.submit(Batch { segments: vec![segment] })?;
    let output = loop {
        if let Some(output) = program.poll() {
            break output?;
        }
    };
    let token = began.elapsed();
    let mut out = std::io::stdout();
    out.write_all(b".")?;
    out.flush()?;
    ensure!(output.segments.len() == 1, "no token came");
    let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
    let t = gpu.load_times();
    println!(
        "driver {:.0} ms, loaded by {:.0}, token by {:.0}; memory {:.0} ms, packing kernel {:.0}, weights {:.0}, kernels {:.0}",
        ms(opened),
        ms(loaded),
        ms(token),
        ms(t.memory),
        ms(t.pack),
        ms(t.weights),
        ms(t.kernels)
    );
    Ok(())
}
