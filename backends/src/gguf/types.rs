//! How tensors are stored.
use std::fmt;

/// A storage type of ggml. Values come in blocks along the first dimension; [`crate::quant`] has the formulas.
#[allow(non_camel_case_types)] // ggml's own names
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an F32.
    BF16,
    /// 4 bits, 32 values with a scale.
    Q4_0,
    /// 4 bits, 32 values with a scale and a minimum.
    Q4_1,
    /// 5 bits, 32 values with a scale.
    Q5_0,
    /// 5 bits, 32 values with a scale and a minimum.
    Q5_1,
    /// 8 bits, 32 values with a scale.
    Q8_0,
    /// 2 bits, 256 values with 16 scales and minima of 4 bits.
    Q2_K,
    /// 3 bits, 256 values with 16 scales of 6 bits.
    Q3_K,
    /// 4 bits, 256 values with 8 scales and minima of 6 bits.
    Q4_K,
    /// 5 bits, 256 values with 8 scales and minima of 6 bits.
    Q5_K,
    /// 6 bits, 256 values with 16 scales of 8 bits.
    Q6_K,
    /// 4 bits into a table of 16 uneven steps, 32 values with a scale.
    IQ4_NL,
    /// The same, 256 values with 8 scales of 6 bits.
    IQ4_XS,
    /// Another type, by its number in the file: it can be listed but not read.
    Unknown(u32),
}

impl GgmlType {
    /// All that can be read.
    pub const KNOWN: [GgmlType; 15] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_NL,
        GgmlType::IQ4_XS,
    ];

    /// The type of that number in a file.
    pub fn from_id(id: u32) -> GgmlType {
        GgmlType::KNOWN.into_iter().find(|ty| ty.id() == id).unwrap_or(GgmlType::Unknown(id))
    }

    /// Its number in a file (`enum ggml_type`).
    pub fn id(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
            GgmlType::Q2_K => 10,
            GgmlType::Q3_K => 11,
            GgmlType::Q4_K => 12,
            GgmlType::Q5_K => 13,
            GgmlType::Q6_K => 14,
            GgmlType::IQ4_NL => 20,
            GgmlType::IQ4_XS => 23,
            GgmlType::BF16 => 30,
            GgmlType::Unknown(id) => id,
        }
    }

    /// Values in a block; 0 for an unknown type.
    pub fn block_values(self) -> usize {
        self.block().0
    }

    /// Bytes of a block; 0 for an unknown type.
    pub fn block_bytes(self) -> usize {
        self.block().1
    }

    /// Bytes that `values` values take: none where they don't fill whole blocks or the type is unknown.
    pub fn bytes_of(self, values: u64) -> Option<u64> {
        let (block_values, block_bytes) = self.block();
        if block_values == 0 || !values.is_multiple_of(block_values as u64) {
            return None;
        }
        (values / block_values as u64).checked_mul(block_bytes as u64)
    }

    fn block(self) -> (usize, usize) {
        match self {
            GgmlType::F32 => (1, 4),
            GgmlType::F16 | GgmlType::BF16 => (1, 2),
            GgmlType::Q4_0 | GgmlType::IQ4_NL => (32, 18),
            GgmlType::Q4_1 => (32, 20),
            GgmlType::Q5_0 => (32, 22),
            GgmlType::Q5_1 => (32, 24),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q2_K => (256, 84),
            GgmlType::Q3_K => (256, 110),
            GgmlType::Q4_K => (256, 144),
            GgmlType::Q5_K => (256, 176),
            GgmlType::Q6_K => (256, 210),
            GgmlType::IQ4_XS => (256, 136),
            GgmlType::Unknown(_) => (0, 0),
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GgmlType::Unknown(id) = self else { return write!(f, "{self:?}") };
        let name = match id {
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return write!(f, "type {id}"),
        };
        write!(f, "{name} (type {id})")
    }
}
