//! Round trips through the writer, and files that mean harm.
use super::write::Writer;
use super::*;

/// A file with a value of every type and three small tensors.
fn tiny() -> Vec<u8> {
    let mut writer = Writer::new("llama");
    writer.set("u8", 200u8).set("i8", -3i8).set("u16", 60_000u16).set("i16", -300i16).set("i32", -7i32);
    writer.set("u64", 1u64 << 40).set("i64", -1i64).set("f64", 0.25f64).set("yes", true).set("f32", 1.5f32);
    writer.set("words", ["", "één", "two", "三"].into_iter().collect::<Strings>());
    writer.set("ints", vec![1i32, -2, 3]).set("floats", vec![0.5f32]).set("flags", vec![true, false]);
    let nested = Array::Array(vec![Array::U16(vec![1, 2]), Array::Array(vec![])]);
    writer.set("nested", Value::Array(nested));
    writer.declare("a", GgmlType::F32, &[3]);
    writer.declare("b", GgmlType::Q8_0, &[64, 2]);
    writer.declare("c", GgmlType::F16, &[2, 2, 2, 2]);
    writer.to_bytes(|t| (0..t.bytes).map(|i| i as u8 ^ t.name.as_bytes()[0]).collect())
}

#[test]
fn what_is_written_is_read() {
    let bytes = tiny();
    let file = ModelFile::from_bytes(bytes.clone()).unwrap();
    assert_eq!(file.total_bytes(), bytes.len() as u64);
    assert_eq!(file.str("general.architecture").unwrap(), "llama");
    assert_eq!((file.u32("u8").unwrap(), file.u32("u16").unwrap()), (200, 60_000));
    assert_eq!((file.f32("f64").unwrap(), file.f32("f32").unwrap()), (0.25, 1.5));
    assert!(file.bool("yes").unwrap());
    let words: &Strings = file.required("words").unwrap();
    assert_eq!(words.iter().collect::<Vec<_>>(), ["", "één", "two", "三"]);
    assert_eq!((words.get(1), words.get(4)), (Some("één"), None));
    assert_eq!(file.required::<&[i32]>("ints").unwrap(), [1, -2, 3]);
    assert_eq!(file.array("nested").unwrap().len(), 2);
    assert_eq!(file.metadata().len(), 16);
    assert_eq!(file.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    let b = file.tensor("b").unwrap();
    assert_eq!((b.ty, b.bytes, b.values(), &b.dims[..]), (GgmlType::Q8_0, 136, 128, &[64u64, 2][..]));
    let mut out = [0; 4];
    file.read(b, 30..34, &mut out).unwrap();
    assert_eq!(out, [30 ^ b'b', 31 ^ b'b', 32 ^ b'b', 33 ^ b'b']);
    assert!(file.read(b, 133..137, &mut out).is_err(), "past the tensor's end");
    assert!(file.read(b, 0..3, &mut out).is_err(), "another length than the buffer's");
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = file.read(b, 4..0, &mut out);
    assert!(backwards.is_err());
}

fn check_error(result: Result<impl std::fmt::Debug, GgufError>, message: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(message), "{error:?} doesn't say {message:?}");
}

#[test]
fn getters_name_the_key() {
    let file = ModelFile::from_bytes(tiny()).unwrap();
    check_error(file.u32("nothing"), "no key nothing");
    check_error(file.u32("i8"), "key i8 of the model file is i8 -3, not a 32-bit unsigned integer");
    check_error(file.u32("u64"), "u64 1099511627776");
    check_error(file.str("words"), "an array of 4 string, not a string");
    check_error(file.required::<&Strings>("ints"), "an array of 3 i32, not an array of strings");
    assert_eq!(file.optional::<bool>("nothing").unwrap(), None);
}

/// Whatever a file holds, opening it and reading its tensors ends without a panic.
fn survive(bytes: Vec<u8>) -> bool {
    match ModelFile::from_bytes(bytes) {
        Ok(file) => {
            for tensor in file.tensors() {
                let mut out = vec![0; tensor.bytes as usize];
                let read = file.read(tensor, 0..tensor.bytes, &mut out);
                assert_eq!(read.is_err(), matches!(tensor.ty, GgmlType::Unknown(_)));
            }
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 1000, "{error}");
            false
        }
    }
}

#[test]
fn truncations_are_errors() {
    let bytes = tiny();
    for length in 0..bytes.len() {
        assert!(!survive(bytes[..length].to_vec()), "cut to {length} of {}", bytes.len());
    }
}

#[test]
fn flipped_bits_do_no_harm() {
    let bytes = tiny();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        survive(flipped);
    }
}

/// `tiny`, with the only occurrence of `from` replaced.
fn patched(from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = tiny();
    let at: Vec<usize> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert_eq!(at.len(), 1, "{from:?}");
    bytes[at[0]..at[0] + to.len()].copy_from_slice(to);
    bytes
}

/// A string as the file has it.
fn name(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let open = |bytes: Vec<u8>| ModelFile::from_bytes(bytes);
    let mut bytes = tiny();
    bytes[..4].copy_from_slice(b"GGML");
    check_error(open(bytes), "is not a GGUF file");
    let mut bytes = tiny();
    bytes[4] = 1;
    check_error(open(bytes), "GGUF version 1");
    let mut bytes = tiny();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    check_error(open(bytes), "are left");
    let mut bytes = tiny();
    bytes[16..24].copy_from_slice(&(1u64 << 60).to_le_bytes());
    check_error(open(bytes), "are left");

    let huge = |key: &str, skip: usize| {
        let from = name(key);
        let mut to = from.clone();
        let bytes = tiny();
        let at = (0..bytes.len()).find(|&i| bytes[i..].starts_with(&from)).unwrap() + from.len();
        to.extend(&bytes[at..at + skip]);
        to.extend((u64::MAX / 2).to_le_bytes());
        patched(&from, &to)
    };
    check_error(open(huge("words", 4 + 4)), "key words");
    check_error(open(huge("ints", 4 + 4)), "key ints");
    check_error(open(huge("general.architecture", 4)), "key general.architecture");
}

#[test]
fn tensors_out_of_place_are_refused() {
    // name, rank, dims, type, offset
    let info = |name_: &str, dims: &[u64], ty: u32, offset: u64| {
        let mut bytes = name(name_);
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(ty.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    };
    let b = info("b", &[64, 2], 8, 32);
    let check = |to: Vec<u8>, message: &str| check_error(ModelFile::from_bytes(patched(&b, &to)), message);
    check(info("b", &[64, 2], 8, 0), "tensors a and b overlap");
    check(info("b", &[64, 2], 8, 33), "isn't a multiple of 32");
    check(info("b", &[64, 2], 8, u64::MAX - 31), "tensor b: is cut short");
    check(info("b", &[64, 2], 8, 1 << 20), "tensor b: is cut short");
    check(info("b", &[64, 0], 8, 32), "zero or overflow");
    check(info("b", &[1 << 40, 1 << 40], 8, 32), "zero or overflow");
    check(info("b", &[1 << 62, 1], 0, 32), "overflow");
    check(info("b", &[65, 2], 8, 32), "rows of 65 values don't fill blocks of Q8_0");
    check(info("a", &[64, 2], 8, 32), "tensor a occurs twice");

    let file = ModelFile::from_bytes(patched(&b, &info("b", &[64, 2], 16, 32))).unwrap();
    let tensor = file.tensor("b").unwrap();
    check_error(file.read(tensor, 0..0, &mut []), "tensor b: is stored as IQ2_XXS (type 16)");
}

#[test]
fn what_is_no_file_is_refused() {
    check_error(ModelFile::open(&std::env::temp_dir()), "is not a regular file");
    check_error(ModelFile::open(Path::new("no/such/model.gguf")), "no/such/model.gguf: can't be read");
}

#[test]
fn a_file_cut_short_while_open_is_an_error() {
    let path = std::env::temp_dir().join(format!("weir-cut-{}.gguf", std::process::id()));
    std::fs::write(&path, tiny()).unwrap();
    let file = ModelFile::open(&path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let tensor = file.tensor("b").unwrap();
    check_error(file.read(tensor, 0..tensor.bytes, &mut [0; 136]), "tensor b: can't be read");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn split_models_are_joined() {
    let folder = std::env::temp_dir().join(format!("weir-split-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |part: u32| folder.join(format!("m-{part:05}-of-00002.gguf"));
    let write = |part: u16, tensor: &str, total: i32| {
        let mut writer = Writer::new("llama");
        writer.set("split.no", part).set("split.count", 2u16).set("split.tensors.count", total);
        writer.declare(tensor, GgmlType::F32, &[8]);
        std::fs::write(path(u32::from(part) + 1), writer.to_bytes(|_| vec![part as u8; 32])).unwrap();
    };
    write(0, "a", 2);
    check_error(ModelFile::open(&path(1)), "m-00002-of-00002.gguf");
    write(1, "b", 2);
    let file = ModelFile::open(&path(1)).unwrap();
    let mut out = [9; 2];
    file.read(file.tensor("b").unwrap(), 4..6, &mut out).unwrap();
    assert_eq!(out, [1, 1]);
    file.read(file.tensor("a").unwrap(), 4..6, &mut out).unwrap();
    assert_eq!(out, [0, 0]);
    check_error(ModelFile::open(&path(2)), "part 2 of 2; open the first");
    write(1, "a", 2);
    check_error(ModelFile::open(&path(1)), "tensor a is in an earlier part too");
    write(1, "b", 2);
    write(0, "a", 3);
    check_error(ModelFile::open(&path(1)), "2 tensors together, not the 3");
    std::fs::rename(path(1), folder.join("odd.gguf")).unwrap();
    check_error(ModelFile::open(&folder.join("odd.gguf")), "doesn't end in -00001-of-00002.gguf");
    check_error(ModelFile::from_bytes(std::fs::read(folder.join("odd.gguf")).unwrap()), "one of 2 parts");
    std::fs::remove_dir_all(&folder).unwrap();
}
