//! What can be checked without a GPU: that the generated kernels compile.
use super::driver::Compiler;
use super::forms::{Chip, Form};
use super::{kernels, load};
use crate::models;
use crate::models::random::Random;
use crate::program::KvLayout;
use weir_scheduler::KvType;

#[test]
fn generated_kernels_compile() {
    let compiler = match Compiler::find() {
        Ok(compiler) => compiler,
        Err(why) => return eprintln!("SKIPPED: {why}"),
    };
    for family in ["llama", "gemma3"] {
        let file = Random::tiny(family, 1).file();
        let plan = models::plan(&file).unwrap();
        let kv = KvLayout { blocks: 8, kv: KvType::F16, slots: 2, rows: 64 };
        // shared memory of a desktop's GPU and of a server's
        for shared in [99 << 10, 160 << 10] {
            let chip = Chip { shared, processors: 108 };
            let low = load::lower(&file, &plan, 0..plan.layers.len(), kv, 1 << 30, chip).unwrap();
            let mut sources = kernels::sources(&low);
            sources.push(kernels::pack_source(&Form::ALL));
            for source in sources {
                for capability in [80, 90] {
                    if let Err(why) = compiler.compile(&source, capability) {
                        panic!("{family}, sm_{capability}: {why}");
                    }
                }
            }
        }
    }
}
