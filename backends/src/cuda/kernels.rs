//! The program's kernels: CUDA C++ for exactly its shapes, compiled by NVRTC and kept on disk by content.
use super::driver::{Compiler, Gpu, Kernel, Module};
use super::forms::{
    AS_PROMPT, Form, PROMPT_THREADS, PROMPT_WIDTHS, WIDE_THREADS, WIDTHS, prompt_shared, wide_shared,
};
use super::load::Lowered;
use crate::program::DeviceError;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

#[cfg(not(feature = "cuda-emulator"))]
const COMMON: &str = concat!(include_str!("ptx.cu"), include_str!("common.cu"));
#[cfg(feature = "cuda-emulator")]
const COMMON: &str = concat!(include_str!("emulate.cpp"), include_str!("common.cu"));
const GEMM: &str = include_str!("gemm.cu");
const FEW: &str = include_str!("few.cu");
const WIDE: &str = include_str!("wide.cu");
const PROMPT: &str = include_str!("prompt.cu");
const ATTEND: &str = include_str!("attend.cu");
const ROWS: &str = include_str!("rows.cu");
const PACK: &str = include_str!("pack.cu");

/// All kernels of a program.
pub struct Kernels {
    /// By product: for few columns, by width, and for many.
    pub gemms: Vec<Vec<Kernel>>,
    /// By product: for prompts, by width; none where it has none.
    pub prompts: Vec<Vec<Kernel>>,
    pub attends: Vec<Attend>,
    pub settles: Vec<Kernel>,
    pub enter: Kernel,
    /// The embedding and the first step in one.
    pub enter_settled: Option<Kernel>,
    pub greedy: Kernel,
    pub most: Kernel,
    pub cut: Kernel,
    pub pick: Kernel,
    pub finish: Kernel,
}

/// Kernels of attention.
pub struct Attend {
    /// Fills the cache.
    pub fill: Kernel,
    /// One row a sequence, whose key and value it writes.
    pub split: Kernel,
    /// Single rows of a cache that is filled.
    pub filled: Kernel,
    /// Tiles of rows.
    pub tile: Kernel,
    /// The same of prompts.
    pub prompt: Kernel,
}

/// `bounds`: threads a block, and least blocks a multiprocessor.
fn kernel(out: &mut String, bounds: (usize, usize), name: &str, args: &str, body: &str) {
    let trace = if args == "AttendArgs" { "p.c.trace" } else { "p.trace" };
    let (threads, blocks) = bounds;
    // writing to a string can't fail
    _ = writeln!(
        out,
        "KERNEL({name}, {threads}, {blocks}, {args}, trace({trace}, 0); {body} trace({trace}, 2);)"
    );
}

/// Source of the products, for a width of [`WIDTHS`], or for many columns.
fn gemm_source(low: &Lowered, width: Option<usize>) -> String {
    let mut s = match width {
        Some(_) => format!("{COMMON}{GEMM}{FEW}"),
        None => format!("{COMMON}{GEMM}\n#define WIDE_ROOM {}\n{WIDE}", low.chip.wide_room()),
    };
    for (i, g) in low.gemms.iter().enumerate() {
        _ = writeln!(s, "struct G{i} {{ {} }};", g.constants);
        let (bounds, body) = match width {
            None => ((WIDE_THREADS, 1), format!("wide<G{i}>(p);")),
            Some(columns) => {
                let (nt, one) = (columns.div_ceil(8), columns == 1);
                let (threads, rounds) = (g.split.threads(columns), g.split.rounds(columns));
                ((threads, g.split.fit(columns)), format!("few<G{i}, {nt}, {one}, {rounds}>(p);"))
            }
        };
        kernel(&mut s, bounds, &format!("g{i}"), "GemmArgs", &body);
    }
    s
}

/// Source of the products of prompts.
fn prompt_source(low: &Lowered) -> String {
    let mut s = format!("{COMMON}{GEMM}{PROMPT}");
    for (i, g) in low.gemms.iter().enumerate() {
        let Some(forms) = g.prompt else { continue };
        _ = writeln!(s, "struct G{i} {{ {} }};", g.constants);
        _ = writeln!(s, "struct P{i} : G{i} {{ static constexpr int FORMS = {forms}; }};");
        for columns in PROMPT_WIDTHS {
            let body = format!("prompt<P{i}, {}>(p);", columns / 8);
            kernel(&mut s, (PROMPT_THREADS, 1), &format!("p{i}_{columns}"), "GemmArgs", &body);
        }
    }
    s
}

fn attend_source(low: &Lowered) -> String {
    let mut s = format!("{COMMON}{ATTEND}");
    for (i, a) in low.attends.iter().enumerate() {
        _ = writeln!(s, "struct A{i} {{ {} }};", a.constants);
        let [(alone, _), (whole, _)] = a.tiles;
        kernel(&mut s, (256, 1), &format!("fill{i}"), "CacheArgs", &format!("fill_cache<A{i}>(p);"));
        kernel(
            &mut s,
            (256, 1),
            &format!("split{i}"),
            "AttendArgs",
            &format!("attend_split<A{i}, {alone}, false>(p);"),
        );
        kernel(
            &mut s,
            (256, 1),
            &format!("filled{i}"),
            "AttendArgs",
            &format!("attend_split<A{i}, {alone}, true>(p);"),
        );
        _ = writeln!(s, "struct B{i} : A{i} {{ static constexpr int FORMS = {AS_PROMPT}; }};");
        for (name, constants) in [("tile", "A"), ("prompt", "B")] {
            let body = format!("attend_tile<{constants}{i}, {whole}>(p);");
            kernel(&mut s, (256, 1), &format!("{name}{i}"), "AttendArgs", &body);
        }
    }
    s
}

fn rows_source(low: &Lowered) -> String {
    let mut s = format!("{COMMON}{GEMM}{ROWS}");
    for (i, body) in low.settles.iter().enumerate() {
        kernel(&mut s, (256, 1), &format!("settle{i}"), "SettleArgs", body);
    }
    kernel(&mut s, (256, 1), "enter_", "EnterArgs", &low.enter_body);
    if let Some(body) = &low.enter_settled {
        kernel(&mut s, (256, 1), "enter_settled", "EnterArgs", body);
    }
    for (name, greedy) in [("most", false), ("greedy", true)] {
        let body = format!("sample_most<{}, {greedy}>(p);", low.vocab);
        kernel(&mut s, (256, 1), name, "SampleArgs", &body);
    }
    kernel(&mut s, (1024, 1), "cut", "SampleArgs", &format!("sample_cut<{}>(p);", low.vocab));
    kernel(&mut s, (256, 1), "pick", "SampleArgs", &format!("sample_pick<{}>(p);", low.vocab));
    s.push_str(
        "struct FinishArgs { u32 *flag; const u32 *step; };\nKERNEL(finish_, 32, 1, FinishArgs, if (threadIdx.x == 0) \
         finish(p.flag, p.step);)\n",
    );
    s
}

/// Source of the kernels that pack weights.
pub fn pack_source(forms: &[Form]) -> String {
    let mut s = format!("{COMMON}{GEMM}{PACK}");
    for form in forms {
        let f = *form as u32;
        _ = writeln!(s, "KERNEL(pack{f}, 256, 1, PackArgs, pack<{f}>(p);)");
    }
    s
}

/// Whether launches note their times, for [`crate::program::Program::profile`]. Costs a little.
pub fn traced() -> bool {
    std::env::var_os("WEIR_CUDA_TRACE").is_some()
}

/// Forms that have to be packed.
fn forms(low: &Lowered) -> Vec<Form> {
    let mut forms: Vec<Form> = Vec::new();
    for job in &low.jobs {
        if !forms.contains(&job.form) {
            forms.push(job.form);
        }
    }
    forms
}

/// The sources of a program's modules: products of many columns (the slowest to compile), of prompts, of few columns by
/// width, the rest.
pub fn sources(low: &Lowered) -> Vec<String> {
    let mut sources = vec![gemm_source(low, None), prompt_source(low)];
    sources.extend(WIDTHS.iter().map(|width| gemm_source(low, Some(*width))));
    sources.extend([attend_source(low), rows_source(low)]);
    if traced() {
        sources.iter_mut().for_each(|s| s.insert_str(0, "#define TRACE\n"));
    }
    sources
}

/// Where compiled kernels are kept; none where the system names no cache.
fn cache_folder() -> Option<PathBuf> {
    crate::store::cache_root().map(|root| root.join("kernels"))
}

/// Machine code for `source`, from the cache if it is there.
pub fn cubin(compiler: &Compiler, capability: u32, source: &str) -> Result<Vec<u8>, DeviceError> {
    let mut digest = Sha256::new();
    digest.update(format!("{:?} sm_{capability} ", compiler.version));
    digest.update(source);
    let name: String = digest.finalize().iter().fold(String::new(), |mut s, b| {
        _ = write!(s, "{b:02x}");
        s
    });
    let path = cache_folder().map(|folder| folder.join(format!("{name}.cubin")));
    if let Some(bytes) = path.as_ref().and_then(|p| std::fs::read(p).ok())
        && bytes.starts_with(b"\x7fELF")
    {
        return Ok(bytes);
    }
    let bytes = compiler
        .compile(source, capability)
        .map_err(|why| DeviceError::Unsupported(format!("a generated kernel doesn't compile: {why}")))?;
    if let Some(path) = path
        && let Err(error) = keep(&path, &bytes)
    {
        tracing::debug!(%error, "a compiled kernel could not be kept");
    }
    Ok(bytes)
}

/// Whole or not at all.
fn keep(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder)?;
    let part = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&part, bytes)?;
    std::fs::rename(part, path)
}

/// Compiles several sources at once.
fn modules(compiler: &Compiler, gpu: &Arc<Gpu>, sources: &[String]) -> Result<Vec<Arc<Module>>, DeviceError> {
    let cubins: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> =
            sources.iter().map(|source| scope.spawn(|| cubin(compiler, gpu.capability, source))).collect();
        let lost = || DeviceError::Lost("NVIDIA's compiler panicked".into());
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(lost()))).collect()
    });
    cubins.into_iter().map(|cubin| Module::load(gpu, &cubin?)).collect()
}

/// Kernels that pack a program's weights. They don't depend on its shapes, so that weights can be on their way while all
/// others are compiled.
pub fn pack(compiler: &Compiler, gpu: &Arc<Gpu>, low: &Lowered) -> Result<Vec<(Form, Kernel)>, DeviceError> {
    let forms = forms(low);
    let module = Module::load(gpu, &cubin(compiler, gpu.capability, &pack_source(&forms))?)?;
    forms.iter().map(|f| Ok((*f, module.kernel(&format!("pack{}", *f as u32), 256, 0, false)?))).collect()
}

impl Kernels {
    /// The program's kernels.
    pub fn new(compiler: &Compiler, gpu: &Arc<Gpu>, low: &Lowered) -> Result<Kernels, DeviceError> {
        let modules = modules(compiler, gpu, &sources(low))?;
        let [wide, prompt, few @ .., attend, rows] = &modules[..] else {
            return Err(DeviceError::Lost("a module is missing".into()));
        };
        let mut gemms = Vec::new();
        for (i, g) in low.gemms.iter().enumerate() {
            let name = format!("g{i}");
            let mut kernels = Vec::new();
            for (module, columns) in few.iter().zip(WIDTHS) {
                kernels.push(module.kernel(
                    &name,
                    g.split.threads(columns),
                    g.split.shared(columns),
                    true,
                )?);
            }
            let shared = wide_shared(&g.forms, low.chip);
            kernels.push(wide.kernel(&name, WIDE_THREADS, shared, true)?);
            gemms.push(kernels);
        }
        let prompts = low.gemms.iter().enumerate().map(|(i, g)| {
            let widths = PROMPT_WIDTHS.iter().filter(|_| g.prompt.is_some());
            let kernel = |columns: &usize| {
                prompt.kernel(&format!("p{i}_{columns}"), PROMPT_THREADS, prompt_shared(*columns), true)
            };
            widths.map(kernel).collect::<Result<Vec<_>, _>>()
        });
        let prompts = prompts.collect::<Result<_, _>>()?;
        let mut attends = Vec::new();
        for (i, a) in low.attends.iter().enumerate() {
            let [(_, alone), (_, whole)] = a.tiles;
            let kernel = |name: &str, shared| attend.kernel(&format!("{name}{i}"), 256, shared, true);
            attends.push(Attend {
                fill: kernel("fill", 0)?,
                split: kernel("split", alone)?,
                filled: kernel("filled", alone)?,
                tile: kernel("tile", whole)?,
                prompt: kernel("prompt", whole)?,
            });
        }
        let settles = (0..low.settles.len()).map(|i| rows.kernel(&format!("settle{i}"), 256, 0, true));
        Ok(Kernels {
            gemms,
            prompts,
            attends,
            settles: settles.collect::<Result<_, _>>()?,
            enter: rows.kernel("enter_", 256, 0, true)?,
            enter_settled: match low.enter_settled {
                Some(_) => Some(rows.kernel("enter_settled", 256, 0, true)?),
                None => None,
            },
            greedy: rows.kernel("greedy", 256, 0, true)?,
            most: rows.kernel("most", 256, 0, true)?,
            cut: rows.kernel("cut", 1024, 0, true)?,
            pick: rows.kernel("pick", 256, 0, true)?,
            finish: rows.kernel("finish_", 32, 0, false)?,
        })
    }
}
