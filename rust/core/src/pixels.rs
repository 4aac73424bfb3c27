//! Conversion kernels: stored pixel bytes to values of an output type.
//!
//! The problem: a stored value is some bits of a cell (PS3.5 section 8.1.1), signed or not, in one
//! of two byte orders, and means `stored * RescaleSlope + RescaleIntercept` (PS3.3 C.11.1). Doing
//! mask, sign, rescale and cast as separate passes over whole volumes costs several times the memory
//! traffic of the result. Here they are one pass over blocks that stay in the first-level cache.
//!
//! The rule: `(stored as f64) * slope + intercept` in f64, rounded once to the output type. Faster
//! arithmetic is used only where it gives the same bits. An integer type must hold every value
//! exactly.

use std::sync::Arc;

use crate::error::{Error, Result};

/// Values converted at a time: 8 KiB of 32 bit cells.
const BLOCK: usize = 2048;

/// How a stored value lies in the pixel bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    allocated: u32,
    stored: u32,
    high_bit: u32,
    signed: bool,
    big_endian: bool,
    swapped_pairs: bool,
}

impl Format {
    /// Single bits, each in a cell of 8.
    pub(crate) const BITS: Format = Format {
        allocated: 8,
        stored: 8,
        high_bit: 7,
        signed: false,
        big_endian: false,
        swapped_pairs: false,
    };

    /// Put cells that are swapped in pairs in their order.
    pub(crate) fn unswap(&mut self, cells: &mut [u8]) {
        if std::mem::take(&mut self.swapped_pairs) {
            let (pairs, _) = cells.as_chunks_mut::<2>();
            pairs.iter_mut().for_each(|pair| pair.reverse());
        }
    }

    /// Bits of a sample, where a cell is an unsigned little endian number of at most 16 bits.
    pub(crate) fn of_samples(&self) -> Option<u32> {
        let little = self.allocated == 8 || !self.big_endian;
        let whole = !self.signed && self.allocated <= 16 && self.high_bit + 1 == self.stored;
        (little && whole && !self.swapped_pairs).then_some(self.stored)
    }

    /// Check the four attributes against each other.
    ///
    /// `swapped_pairs`: 8 bit cells whose bytes are swapped in pairs.
    ///
    /// Errors: [`Error::UnsupportedImage`] for cells other than 8, 16 or 32 bit;
    /// [`Error::InvalidDicom`] for a contradiction.
    pub fn new(
        allocated: u32,
        stored: u32,
        high_bit: u32,
        representation: u32,
        big_endian: bool,
        swapped_pairs: bool,
    ) -> Result<Self> {
        if !matches!(allocated, 8 | 16 | 32) {
            let message = format!("expected BitsAllocated of 8, 16 or 32, found {allocated}");
            return Err(Error::unsupported(message).at(0x0028_0100));
        }
        if stored == 0 || stored > allocated {
            return Err(Error::invalid_at(
                0x0028_0101,
                format!("expected 1 to {allocated} (BitsAllocated), found {stored}"),
            ));
        }
        if high_bit >= allocated || high_bit + 1 < stored {
            let low = stored - 1;
            return Err(Error::invalid_at(
                0x0028_0102,
                format!(
                    "expected {low} (BitsStored - 1) to {}, found {high_bit}",
                    allocated - 1
                ),
            ));
        }
        if representation > 1 {
            return Err(Error::invalid_at(
                0x0028_0103,
                format!("expected 0 or 1, found {representation}"),
            ));
        }
        let swapped_pairs = swapped_pairs && allocated == 8;
        let signed = representation == 1;
        Ok(Format {
            allocated,
            stored,
            high_bit,
            signed,
            big_endian,
            swapped_pairs,
        })
    }

    /// Bytes of one value.
    pub fn cell(&self) -> usize {
        self.allocated as usize / 8
    }

    /// Whether a cell is its value in the order of this machine's bytes.
    fn is_plain(&self) -> bool {
        let little = !self.big_endian || self.allocated == 8;
        self.stored == self.allocated
            && little
            && !self.swapped_pairs
            && cfg!(target_endian = "little")
    }

    /// Smallest and largest value that the stored bits can hold.
    fn bounds(&self) -> (i64, i64) {
        if self.signed {
            (-(1 << (self.stored - 1)), (1 << (self.stored - 1)) - 1)
        } else {
            (0, (1 << self.stored) - 1)
        }
    }
}

/// A table from stored values to what they mean, such as a Modality LUT (PS3.3 C.11.1.1).
///
/// Values below the first have its meaning, those above the last that of the last.
#[derive(Debug, Clone, PartialEq)]
pub struct Lut {
    /// The stored value of the first entry.
    pub first: i64,
    pub values: Vec<f64>,
}

impl Lut {
    fn get(&self, stored: i64) -> f64 {
        let last = self.values.len().saturating_sub(1);
        let at = usize::try_from(stored.saturating_sub(self.first)).unwrap_or(0);
        self.values.get(at.min(last)).copied().unwrap_or(f64::NAN)
    }
}

/// An element type of the output.
pub trait Value: Copy + Send + Sync + 'static {
    /// As numpy calls it.
    const NAME: &'static str;
    /// Whether it is a floating point type.
    const FLOAT: bool;
    /// Smallest finite value.
    const MIN: f64;
    /// Largest finite value.
    const MAX: f64;
    /// Largest magnitude below which every integer is exact in this type's own arithmetic.
    const EXACT: f64;
    /// The low bits.
    fn from_bits(bits: u32) -> Self;
    /// Nearest value, saturating for integers.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// `stored * slope + intercept` in this type's own arithmetic.
    fn affine(stored: i32, slope: Self, intercept: Self) -> Self;
}

macro_rules! value {
    ($($t:ident $name:literal $float:literal $exact:expr, $affine:expr;)*) => {$(
        impl Value for $t {
            const NAME: &'static str = $name;
            const FLOAT: bool = $float;
            const MIN: f64 = $t::MIN as f64;
            const MAX: f64 = $t::MAX as f64;
            const EXACT: f64 = $exact;
            #[inline(always)]
            fn from_bits(bits: u32) -> Self {
                bits as $t
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn affine(stored: i32, slope: Self, intercept: Self) -> Self {
                let f: fn($t, $t, $t) -> $t = $affine;
                f(stored as $t, slope, intercept)
            }
        }
    )*};
}

value! {
    f32 "float32" true 16_777_216.0, |x, a, b| x * a + b;
    f64 "float64" true 0.0, |x, a, b| x * a + b;
    i8 "int8" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
    u8 "uint8" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
    i16 "int16" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
    u16 "uint16" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
    i32 "int32" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
    u32 "uint32" false 0.0, |x, a, b| x.wrapping_mul(a).wrapping_add(b);
}

/// Which arithmetic gives the bits of the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The output type's own floats: every step is an integer that it holds.
    Own,
    /// f64, and every result is finite in the output type.
    Double,
    /// f64, and each result has to be checked.
    Checked,
    /// Integers modulo 2^32; `true` where the smallest and the largest value have to be checked.
    Whole {
        slope: i64,
        intercept: i64,
        check: bool,
    },
    /// By a table, and each result has to be checked.
    Table,
    /// The cells are the values.
    Copy,
}

/// The conversion of one image to `T`.
#[derive(Debug)]
pub struct Conversion {
    format: Format,
    slope: f64,
    intercept: f64,
    lut: Option<Arc<Lut>>,
    way: Way,
    /// Range of the checked values so far.
    low: f64,
    high: f64,
    /// A value was found that the output type does not hold.
    unfit: bool,
}

impl Conversion {
    /// Choose the arithmetic for one image.
    pub fn new<T: Value>(format: Format, slope: f64, intercept: f64) -> Self {
        let (low, high) = format.bounds();
        let largest = low.unsigned_abs().max(high.unsigned_abs()) as f64;
        let bound = largest * slope.abs() + intercept.abs();
        let integral = slope.fract() == 0.0 && intercept.fract() == 0.0;
        let way = if T::FLOAT {
            match () {
                () if integral && bound < T::EXACT => Way::Own,
                () if bound < T::MAX => Way::Double,
                () => Way::Checked,
            }
        } else if integral && bound < 9_007_199_254_740_992.0 && slope.abs() < 4_294_967_296.0 {
            let (slope, intercept) = (slope as i64, intercept as i64);
            let ends = [low * slope + intercept, high * slope + intercept];
            let fits = ends
                .iter()
                .all(|end| (T::MIN..=T::MAX).contains(&(*end as f64)));
            let same = slope == 1 && intercept == 0 && fits;
            if same && format.is_plain() && size_of::<T>() == format.cell() {
                Way::Copy
            } else {
                Way::Whole {
                    slope,
                    intercept,
                    check: !fits,
                }
            }
        } else {
            Way::Checked
        };
        let (low, high) = (f64::INFINITY, f64::NEG_INFINITY);
        Conversion {
            format,
            slope,
            intercept,
            lut: None,
            way,
            low,
            high,
            unfit: false,
        }
    }

    /// The conversion by a table instead of slope and intercept.
    pub fn by_table<T: Value>(format: Format, lut: Arc<Lut>) -> Self {
        Conversion {
            lut: Some(lut),
            way: Way::Table,
            ..Conversion::new::<T>(format, 1.0, 0.0)
        }
    }

    /// Convert `out.len()` values; `bytes` holds exactly [`Format::bytes`] of them.
    ///
    /// Call [`Conversion::finish`] after the last part of an image.
    pub fn run<T: Value>(&mut self, bytes: &[u8], out: &mut [T]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, it was asked in the line above.
            return unsafe { run_avx2(self, bytes, out) };
        }
        run(self, bytes, out);
    }

    /// Convert floats (PS3.3 C.7.6.24): `out.len()` of them, little endian unless `big`.
    ///
    /// What is not finite stays so in a floating point type.
    pub fn run_floats<T: Value, const N: usize>(
        &mut self,
        bytes: &[u8],
        out: &mut [T],
        double: impl Fn([u8; N]) -> f64,
    ) {
        let (cells, _) = bytes.as_chunks::<N>();
        let (mut low, mut high, mut fit) = (self.low, self.high, true);
        for (out, cell) in out.iter_mut().zip(cells) {
            let stored = double(*cell);
            let value = stored * self.slope + self.intercept;
            *out = T::from_f64(value);
            let back = (*out).to_f64();
            fit &= if T::FLOAT {
                back.is_finite() || !stored.is_finite()
            } else {
                back == value
            };
            low = low.min(value);
            high = high.max(value);
        }
        (self.low, self.high) = (low, high);
        self.unfit |= !fit;
    }

    /// The error if some value did not fit `T`.
    pub fn finish<T: Value>(&self) -> Result<()> {
        if !self.unfit {
            return Ok(());
        }
        let Conversion {
            slope,
            intercept,
            low,
            high,
            ..
        } = self;
        let (name, min, max) = (T::NAME, T::MIN, T::MAX);
        let remedy = if !T::FLOAT {
            "use float32"
        } else if T::NAME == "float32" {
            "use float64"
        } else {
            "read without rescale"
        };
        let expected = if T::FLOAT {
            format!("finite values of {name}")
        } else {
            format!("integers from {min} to {max} ({name})")
        };
        let found = if low > high {
            "values that are no numbers".to_owned()
        } else {
            format!("values from {low} to {high}")
        };
        Err(Error::unfit(format!(
            "expected {expected}, found {found} with RescaleSlope {slope} and \
             RescaleIntercept {intercept}; {remedy}"
        )))
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2<T: Value>(conversion: &mut Conversion, bytes: &[u8], out: &mut [T]) {
    run(conversion, bytes, out);
}

#[inline(always)]
fn run<T: Value>(conversion: &mut Conversion, bytes: &[u8], out: &mut [T]) {
    let format = conversion.format;
    if conversion.way == Way::Copy {
        return copy(format, bytes, out);
    }
    if T::FLOAT && conversion.way == Way::Own {
        // Most images are this: one loop without a block, because nothing is looked at twice. The
        // bound of this way keeps the stored values within i32.
        let (slope, intercept) = (
            T::from_f64(conversion.slope),
            T::from_f64(conversion.intercept),
        );
        return expand(format, bytes, out, |bits| {
            T::affine(bits.cast_signed(), slope, intercept)
        });
    }
    let mut block = [0_u32; BLOCK];
    // A block is an even number of values, so swapped pairs do not straddle two blocks.
    let cells = bytes.chunks(BLOCK * format.cell());
    for (cells, out) in cells.zip(out.chunks_mut(BLOCK)) {
        let (stored, _) = block.split_at_mut(out.len());
        expand(format, cells, stored, |bits| bits);
        if format.stored == 32 && !format.signed {
            write(conversion, stored, out, i64::from, f64::from);
        } else {
            let signed = |bits: u32| i64::from(bits.cast_signed());
            write(conversion, stored, out, signed, |bits| {
                f64::from(bits.cast_signed())
            });
        }
    }
}

/// Cells that are values, as they are.
#[inline(always)]
fn copy<T: Value>(format: Format, bytes: &[u8], out: &mut [T]) {
    match format.cell() {
        1 => {
            for (out, cell) in out.iter_mut().zip(bytes) {
                *out = T::from_bits(u32::from(*cell));
            }
        }
        2 => {
            for (out, cell) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = T::from_bits(u32::from(u16::from_le_bytes(*cell)));
            }
        }
        _ => {
            for (out, cell) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = T::from_bits(u32::from_le_bytes(*cell));
            }
        }
    }
}

/// `each` of the stored values as 32 bit integers, sign-extended where signed.
///
/// Shifting left until the high bit is the top one, then right until the low bit is the bottom one
/// (arithmetically where signed), drops foreign bits on both sides and extends the sign.
#[inline(always)]
fn expand<O>(format: Format, cells: &[u8], out: &mut [O], each: impl Fn(u32) -> O) {
    let left = 31 - format.high_bit;
    let right = 32 - format.stored;
    if format.signed {
        cut(format, cells, out, |raw| {
            each(((raw << left).cast_signed() >> right).cast_unsigned())
        });
    } else {
        cut(format, cells, out, |raw| each((raw << left) >> right));
    }
}

#[inline(always)]
fn cut<O>(format: Format, cells: &[u8], out: &mut [O], value: impl Fn(u32) -> O) {
    match (format.allocated, format.big_endian) {
        (8, _) if format.swapped_pairs => {
            for (out, pair) in out.chunks_mut(2).zip(cells.chunks_exact(2)) {
                for (out, cell) in out.iter_mut().zip(pair.iter().rev()) {
                    *out = value(u32::from(*cell));
                }
            }
        }
        (8, _) => {
            for (out, cell) in out.iter_mut().zip(cells) {
                *out = value(u32::from(*cell));
            }
        }
        (16, false) => {
            for (out, cell) in out.iter_mut().zip(cells.chunks_exact(2)) {
                *out = value(u32::from(u16::from_le_bytes([cell[0], cell[1]])));
            }
        }
        (16, true) => {
            for (out, cell) in out.iter_mut().zip(cells.chunks_exact(2)) {
                *out = value(u32::from(u16::from_be_bytes([cell[0], cell[1]])));
            }
        }
        (_, false) => {
            for (out, cell) in out.iter_mut().zip(cells.chunks_exact(4)) {
                let cell = [cell[0], cell[1], cell[2], cell[3]];
                *out = value(u32::from_le_bytes(cell));
            }
        }
        (_, true) => {
            for (out, cell) in out.iter_mut().zip(cells.chunks_exact(4)) {
                let cell = [cell[0], cell[1], cell[2], cell[3]];
                *out = value(u32::from_be_bytes(cell));
            }
        }
    }
}

/// Rescale and cast one block.
#[inline(always)]
fn write<T: Value>(
    conversion: &mut Conversion,
    stored: &[u32],
    out: &mut [T],
    integer: impl Fn(u32) -> i64,
    double: impl Fn(u32) -> f64,
) {
    let (slope, intercept) = (conversion.slope, conversion.intercept);
    match conversion.way {
        // `run` does the first of them itself.
        Way::Own | Way::Double => {
            for (out, bits) in out.iter_mut().zip(stored) {
                *out = T::from_f64(double(*bits) * slope + intercept);
            }
        }
        Way::Checked => {
            let (mut low, mut high, mut fit) = (conversion.low, conversion.high, true);
            for (out, bits) in out.iter_mut().zip(stored) {
                let value = double(*bits) * slope + intercept;
                *out = T::from_f64(value);
                let back = (*out).to_f64();
                fit &= if T::FLOAT {
                    back.is_finite()
                } else {
                    back == value
                };
                low = low.min(value);
                high = high.max(value);
            }
            (conversion.low, conversion.high) = (low, high);
            conversion.unfit |= !fit;
        }
        Way::Table => {
            let Some(lut) = &conversion.lut else { return };
            let (mut low, mut high, mut fit) = (conversion.low, conversion.high, true);
            for (out, bits) in out.iter_mut().zip(stored) {
                let value = lut.get(integer(*bits));
                *out = T::from_f64(value);
                let back = (*out).to_f64();
                fit &= back == value || (T::FLOAT && (back.is_finite() || value.is_nan()));
                low = low.min(value);
                high = high.max(value);
            }
            (conversion.low, conversion.high) = (low, high);
            conversion.unfit |= !fit;
        }
        Way::Copy => copy(conversion.format, &[], out),
        Way::Whole {
            slope,
            intercept,
            check,
        } => {
            if check && !stored.is_empty() {
                // The map is monotonic, so its ends are those of the stored values.
                let (mut low, mut high) = (i64::MAX, i64::MIN);
                for bits in stored {
                    low = low.min(integer(*bits));
                    high = high.max(integer(*bits));
                }
                for end in [low, high] {
                    let value = (end * slope + intercept) as f64;
                    conversion.low = conversion.low.min(value);
                    conversion.high = conversion.high.max(value);
                    conversion.unfit |= !(T::MIN..=T::MAX).contains(&value);
                }
            }
            // What fits is right modulo 2^32; truncation keeps the low bits.
            let (slope, intercept) = (slope as u32, intercept as u32);
            for (out, bits) in out.iter_mut().zip(stored) {
                *out = T::from_bits(bits.wrapping_mul(slope).wrapping_add(intercept));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule, one value at a time.
    fn slow(format: Format, cell: &[u8], slope: f64, intercept: f64) -> f64 {
        let mut raw = 0_u64;
        for (i, byte) in cell.iter().enumerate() {
            let place = if format.big_endian {
                cell.len() - 1 - i
            } else {
                i
            };
            raw |= u64::from(*byte) << (8 * place);
        }
        let raw = (raw >> (format.high_bit + 1 - format.stored)) & ((1 << format.stored) - 1);
        let sign = 1_u64 << (format.stored - 1);
        let stored = raw as i64
            - if format.signed && raw & sign != 0 {
                1 << format.stored
            } else {
                0
            };
        stored as f64 * slope + intercept
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn compare<T: Value + PartialEq + std::fmt::Debug>(format: Format, slope: f64, intercept: f64) {
        let count = BLOCK + 37;
        let bytes = noise(count * format.cell());
        let mut out = vec![T::from_bits(0); count];
        let mut conversion = Conversion::new::<T>(format, slope, intercept);
        conversion.run(&bytes, &mut out);
        let expected: Vec<f64> = bytes
            .chunks(format.cell())
            .map(|cell| slow(format, cell, slope, intercept))
            .collect();
        let fits = expected.iter().all(|value| {
            let out = T::from_f64(*value).to_f64();
            if T::FLOAT {
                out.is_finite()
            } else {
                out == *value
            }
        });
        assert_eq!(
            conversion.finish::<T>().is_ok(),
            fits,
            "{format:?} {slope} {intercept}"
        );
        if fits {
            for (out, expected) in out.iter().zip(&expected) {
                let expected = T::from_f64(*expected);
                let (out, expected) = (out.to_f64().to_bits(), expected.to_f64().to_bits());
                assert_eq!(out, expected, "{format:?} {slope} {intercept}");
            }
        }
    }

    #[test]
    fn every_format_follows_the_rule_bit_for_bit() {
        let rescales = [
            (1.0, 0.0),
            (1.0, -1024.0),
            (-1.0, 0.0),
            (-3.0, 7.0),
            (0.1, -0.3),
            (1e-9, 0.0),
            (257.0, 16.0),
            (65537.0, -5.0),
            (0.5, 0.0),
            (1e36, 0.0),
            (1e305, 1e307),
        ];
        for allocated in [8, 16, 32] {
            for stored in [1, 7, 8, 12, 15, 16, 24, 31, 32] {
                for high_bit in [stored - 1, stored, allocated - 1] {
                    if stored > allocated || high_bit >= allocated || high_bit + 1 < stored {
                        continue;
                    }
                    for signed in [0, 1] {
                        for big in [false, true] {
                            let format =
                                Format::new(allocated, stored, high_bit, signed, big, false);
                            let format = format.unwrap();
                            for (slope, intercept) in rescales {
                                compare::<f32>(format, slope, intercept);
                                compare::<f64>(format, slope, intercept);
                                compare::<i8>(format, slope, intercept);
                                compare::<u8>(format, slope, intercept);
                                compare::<i16>(format, slope, intercept);
                                compare::<u16>(format, slope, intercept);
                                compare::<i32>(format, slope, intercept);
                                compare::<u32>(format, slope, intercept);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn swapped_pairs_are_swapped_back_and_need_whole_pairs() {
        let format = Format::new(8, 8, 7, 0, true, true).unwrap();
        let mut out = [0_u8; 3];
        Conversion::new::<u8>(format, 1.0, 0.0).run(&[2, 1, 99, 3], &mut out);
        assert_eq!(out, [1, 2, 3]);
    }

    #[test]
    fn a_table_has_a_meaning_for_every_value() {
        let format = Format::new(16, 16, 15, 1, false, false).unwrap();
        let lut = Arc::new(Lut {
            first: -1,
            values: vec![5.0, 6.5, 7.0],
        });
        let cells: Vec<u8> = [-9_i16, -1, 0, 1, 9]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        let mut out = [0_f32; 5];
        let mut conversion = Conversion::by_table::<f32>(format, Arc::clone(&lut));
        conversion.run(&cells, &mut out);
        assert_eq!(out, [5.0, 5.0, 6.5, 7.0, 7.0]);
        assert!(conversion.finish::<f32>().is_ok());
        let mut conversion = Conversion::by_table::<u8>(format, lut);
        conversion.run(&cells, &mut [0_u8; 5]);
        assert!(matches!(
            conversion.finish::<u8>(),
            Err(Error::InvalidDataset(_))
        ));
    }

    #[test]
    fn floats_that_do_not_fit_are_refused_and_those_that_are_none_stay() {
        let bytes: Vec<u8> = [1.5_f64, f64::NAN, f64::INFINITY]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        let mut conversion = Conversion::new::<f32>(Format::BITS, 2.0, 0.0);
        let mut out = [0_f32; 3];
        conversion.run_floats(&bytes, &mut out, f64::from_le_bytes);
        assert!(out[0] == 3.0 && out[1].is_nan() && out[2] == f32::INFINITY);
        assert!(conversion.finish::<f32>().is_ok());
        for big in [1e300_f64, -1e300] {
            let mut conversion = Conversion::new::<f32>(Format::BITS, 1.0, 0.0);
            conversion.run_floats(&big.to_le_bytes(), &mut out[..1], f64::from_le_bytes);
            assert!(conversion.finish::<f32>().is_err());
        }
        let mut conversion = Conversion::new::<i16>(Format::BITS, 1.0, 0.0);
        conversion.run_floats(&bytes, &mut [0_i16; 3], f64::from_le_bytes);
        assert!(conversion.finish::<i16>().is_err());
    }

    #[test]
    fn contradictory_bits_are_refused() {
        for (allocated, stored, high) in [(16, 0, 0), (16, 17, 16), (8, 8, 8), (16, 12, 10)] {
            let found = Format::new(allocated, stored, high, 0, false, false);
            assert!(
                matches!(found, Err(Error::InvalidDicom(_))),
                "{allocated} {stored} {high}"
            );
        }
        for allocated in [0, 1, 7, 12, 24, 64] {
            let found = Format::new(allocated, 1, 0, 0, false, false);
            assert!(
                matches!(found, Err(Error::UnsupportedImage(_))),
                "{allocated}"
            );
        }
        assert!(Format::new(16, 16, 15, 2, false, false).is_err());
    }
}
