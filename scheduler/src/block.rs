//! The name of a block of KV cache: equal names mean equal contents, on every node.
use crate::ModelId;

/// Tokens in one KV block, everywhere: the unit of paging, of prefix sharing and of prefix affinity.
pub const BLOCK_TOKENS: usize = 32;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// IEEE half precision.
    #[default]
    F16,
    /// 8-bit integers with one f16 scale for 32 values along the head dimension.
    Q8_0,
}

impl KvType {
    fn tag(self) -> u8 {
        match self {
            KvType::F16 => 1,
            KvType::Q8_0 => 2,
        }
    }
}

/// A 128-bit name of one full KV block and all that came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey(pub [u8; 16]);

/// The keys of every full block of `tokens`, first to last.
///
/// `key = BLAKE3(model sha256, KV type, tenant salt, parent key, ids as little-endian u32)`, first 128 bits; the
/// parent of the first block is all zeros. A trailing partial block has no key.
pub fn chain(model: ModelId, kv: KvType, salt: u64, tokens: &[u32]) -> impl Iterator<Item = BlockKey> + '_ {
    let mut parent = [0u8; 16];
    tokens.chunks_exact(BLOCK_TOKENS).map(move |ids| {
        let mut bytes = [0u8; 32 + 1 + 8 + 16 + 4 * BLOCK_TOKENS];
        bytes[..32].copy_from_slice(&model.0);
        bytes[32] = kv.tag();
        bytes[33..41].copy_from_slice(&salt.to_le_bytes());
        bytes[41..57].copy_from_slice(&parent);
        for (at, id) in bytes[57..].chunks_exact_mut(4).zip(ids) {
            at.copy_from_slice(&id.to_le_bytes());
        }
        parent.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
        BlockKey(parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_whole_past() {
        let model = ModelId([7; 32]);
        let tokens: Vec<u32> = (0..100).collect();
        let keys: Vec<_> = chain(model, KvType::F16, 0, &tokens).collect();
        assert_eq!(keys.len(), 3);
        assert_eq!(keys[..2], chain(model, KvType::F16, 0, &tokens[..70]).collect::<Vec<_>>()[..]);
        let mut other = tokens.clone();
        other[0] = 1;
        for (a, b) in keys.iter().zip(chain(model, KvType::F16, 0, &other)) {
            assert_ne!(*a, b);
        }
        assert_ne!(Some(keys[0]), chain(model, KvType::Q8_0, 0, &tokens).next());
        assert_ne!(Some(keys[0]), chain(model, KvType::F16, 1, &tokens).next());
        assert_ne!(Some(keys[0]), chain(ModelId([8; 32]), KvType::F16, 0, &tokens).next());
    }
}
