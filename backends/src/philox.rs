//! Philox4x32-10, a counter-based random generator: any word of the stream without the ones before it.
//!
//! Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). Ten rounds of two 32x32-bit
//! products; every device computes the same words.

const MULTIPLY: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four words that belong to `counter` under `key`.
#[inline]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(MULTIPLY[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLY[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The words of N counters in a row, the first word counting up from `counter[0]`: `[word][counter]`.
#[inline]
pub fn philox4x32_run<const N: usize>(counter: [u32; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    let mut c = counter.map(|word| [word; N]);
    for (i, word) in c[0].iter_mut().enumerate() {
        *word = word.wrapping_add(i as u32);
    }
    for _ in 0..10 {
        let mut next = [[0; N]; 4];
        for i in 0..N {
            let a = u64::from(MULTIPLY[0]) * u64::from(c[0][i]);
            let b = u64::from(MULTIPLY[1]) * u64::from(c[2][i]);
            next[0][i] = (b >> 32) as u32 ^ c[1][i] ^ key[0];
            next[1][i] = b as u32;
            next[2][i] = (a >> 32) as u32 ^ c[3][i] ^ key[1];
            next[3][i] = a as u32;
        }
        c = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_its_counters_one_by_one() {
        let words = philox4x32_run::<8>([100, 7, 8, 9], [3, 4]);
        for i in 0..8 {
            let expected = philox4x32([100 + i, 7, 8, 9], [3, 4]);
            assert_eq!([0, 1, 2, 3].map(|word: usize| words[word][i as usize]), expected);
        }
    }

    /// The known answers that come with Random123.
    #[test]
    fn known_answers() {
        let check = |counter, key, expected: [u32; 4]| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }
}
