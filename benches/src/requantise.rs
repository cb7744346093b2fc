//! The same model with its matrices stored otherwise: a larger one to guess for, or a smaller one that guesses.
use anyhow::{Context as _, Result};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use weir_backends::gguf::write::Writer;
use weir_backends::gguf::{GgmlType, ModelFile, TensorInfo};
use weir_backends::quant;

/// Writes the model in `from` to `to` with its matrices as `ty`; the embedding and the output matrix as [`GgmlType::Q8_0`]
/// where that is finer, and vectors as they are. Values are rounded once more: a type isn't better for being larger.
pub fn requantise(from: &Path, ty: GgmlType, to: &Path) -> Result<()> {
    let file = ModelFile::open(from)?;
    let mut writer = Writer::new(file.str("general.architecture")?);
    for (key, value) in file.metadata() {
        writer.set(key, value.clone());
    }
    for tensor in file.tensors() {
        writer.declare(&tensor.name, stored(tensor, ty), &tensor.dims);
    }
    let mut failed = None;
    let mut out = BufWriter::new(File::create(to)?);
    writer.write(&mut out, |declared| {
        let converted = convert(&file, &declared.name, declared.ty);
        converted.unwrap_or_else(|error| {
            failed.get_or_insert(error);
            vec![0; declared.bytes as usize]
        })
    })?;
    out.flush()?;
    failed.map_or(Ok(()), Err)
}

fn stored(tensor: &TensorInfo, ty: GgmlType) -> GgmlType {
    let head = matches!(tensor.name.as_str(), "token_embd.weight" | "output.weight");
    let coarse = !matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    match tensor.dims.len() {
        1 => tensor.ty,
        _ if !tensor.dims[0].is_multiple_of(ty.block_values() as u64) => GgmlType::F16,
        _ if head && coarse => GgmlType::Q8_0,
        _ => ty,
    }
}

fn convert(file: &ModelFile, name: &str, ty: GgmlType) -> Result<Vec<u8>> {
    let tensor = file.tensor(name).context("a tensor is gone")?;
    let mut bytes = vec![0u8; tensor.bytes as usize];
    file.read(tensor, 0..tensor.bytes, &mut bytes)?;
    if ty == tensor.ty {
        return Ok(bytes);
    }
    let mut values = vec![0f32; tensor.values() as usize];
    quant::dequantize(tensor.ty, &bytes, &mut values);
    quant::quantize(ty, &values).with_context(|| format!("nothing is quantised to {ty}"))
}
