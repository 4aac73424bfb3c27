//! Whether the pixel data of an image is as long as its header says.
//!
//! The problem: a sender that lost a part of an image sends the rest with a length that fits what is left. Nothing in the encoding tells,
//! but Rows, Columns and the attributes beside them do (PS3.5 section 8.1, PS3.3 section C.7.6.3).

use crate::error::Result;
use crate::scan::{DOUBLE_FLOAT_PIXEL_DATA, FLOAT_PIXEL_DATA, Header};

const SAMPLES_PER_PIXEL: u32 = 0x0028_0002;
const PHOTOMETRIC_INTERPRETATION: u32 = 0x0028_0004;
const NUMBER_OF_FRAMES: u32 = 0x0028_0008;
const ROWS: u32 = 0x0028_0010;
const COLUMNS: u32 = 0x0028_0011;
const BITS_ALLOCATED: u32 = 0x0028_0100;

/// How many bytes of uncompressed pixel data are missing; 0 where none are, or where the header does not tell.
///
/// `whole` are the bytes that were scanned, where the header does not hold them.
///
/// # Errors
/// As [`Header::value`].
pub fn missing_pixels(header: &Header, whole: Option<&[u8]>) -> Result<u64> {
    let layout = header.layout();
    let Some(pixels) = layout.pixels().filter(|_| layout.is_native()) else {
        return Ok(0);
    };
    let number = |tag| -> Result<Option<u128>> {
        let found = header.value(tag, whole)?;
        Ok(found
            .and_then(|(_, value)| match *value {
                [first, second] if layout.big_endian() => Some(u16::from_be_bytes([first, second])),
                [first, second] => Some(u16::from_le_bytes([first, second])),
                _ => None,
            })
            .map(u128::from))
    };
    let bits = match pixels.tag {
        FLOAT_PIXEL_DATA => Some(32),
        DOUBLE_FLOAT_PIXEL_DATA => Some(64),
        _ => number(BITS_ALLOCATED)?,
    };
    let (Some(bits), Some(rows), Some(columns)) = (bits, number(ROWS)?, number(COLUMNS)?) else {
        return Ok(0);
    };
    let frames = match header.value(NUMBER_OF_FRAMES, whole)? {
        None => 1,
        Some((_, text)) => {
            let text = std::str::from_utf8(&text).unwrap_or_default();
            // What is no number is told when the image is read.
            text.trim_matches([' ', '\0']).parse::<u32>().unwrap_or(1)
        }
    };
    let photometric = header.value(PHOTOMETRIC_INTERPRETATION, whole)?;
    let photometric = photometric.map_or_else(String::new, |(_, text)| {
        String::from_utf8_lossy(&text).into_owned()
    });
    let photometric = photometric.trim_matches([' ', '\0']);
    let samples = match number(SAMPLES_PER_PIXEL)?.unwrap_or(1) {
        // Of each pair of pixels both have a Y, and share Cb and Cr (PS3.3 section C.7.6.3.1.2).
        3 if photometric.ends_with("_422") => 2,
        // Of compressed images only.
        3 if photometric.ends_with("_420") => return Ok(0),
        samples => samples,
    };
    let wanted = (rows * columns * samples * bits * u128::from(frames)).div_ceil(8);
    let missing = wanted.saturating_sub(u128::from(pixels.length));
    Ok(u64::try_from(missing).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::scan;
    use crate::source::Source;

    const EXPLICIT: &str = "1.2.840.10008.1.2.1";
    const BIG: &str = "1.2.840.10008.1.2.2";

    struct Given {
        syntax: &'static str,
        numbers: Vec<(u32, u16)>,
        photometric: &'static str,
        frames: &'static str,
        tag: u32,
    }

    impl Default for Given {
        fn default() -> Self {
            Given {
                syntax: EXPLICIT,
                numbers: vec![(ROWS, 5), (COLUMNS, 3), (BITS_ALLOCATED, 16)],
                photometric: "MONOCHROME2 ",
                frames: "",
                tag: 0x7FE0_0010,
            }
        }
    }

    /// How much pixel data is missing where there are so many bytes.
    fn missing(given: &Given, length: usize) -> u64 {
        let is_big = given.syntax == BIG;
        let short = |value: u16| match is_big {
            true => value.to_be_bytes(),
            false => value.to_le_bytes(),
        };
        let mut values: Vec<(u32, &[u8; 2], Vec<u8>)> = vec![(
            PHOTOMETRIC_INTERPRETATION,
            b"CS",
            given.photometric.as_bytes().to_vec(),
        )];
        if !given.frames.is_empty() {
            values.push((NUMBER_OF_FRAMES, b"IS", given.frames.as_bytes().to_vec()));
        }
        for (tag, value) in &given.numbers {
            values.push((*tag, b"US", short(*value).to_vec()));
        }
        values.sort_by_key(|one| one.0);
        let mut bytes = Vec::new();
        for (tag, vr, value) in values {
            bytes.extend(short((tag >> 16) as u16));
            bytes.extend(short((tag & 0xFFFF) as u16));
            bytes.extend(vr);
            bytes.extend(short(value.len() as u16));
            bytes.extend(value);
        }
        bytes.extend(short(0x7FE0));
        bytes.extend(short((given.tag & 0xFFFF) as u16));
        bytes.extend(match given.tag {
            FLOAT_PIXEL_DATA => b"OF\0\0",
            DOUBLE_FLOAT_PIXEL_DATA => b"OD\0\0",
            _ => b"OW\0\0",
        });
        bytes.extend(match is_big {
            true => (length as u32).to_be_bytes(),
            false => (length as u32).to_le_bytes(),
        });
        bytes.resize(bytes.len() + length, 0);
        let header = scan(Source::Bytes(&bytes), Some(given.syntax)).unwrap();
        missing_pixels(&header, Some(&bytes)).unwrap()
    }

    #[test]
    fn what_is_missing_is_told_in_bytes() {
        for syntax in [EXPLICIT, BIG] {
            let given = Given {
                syntax,
                ..Given::default()
            };
            for (length, wanted) in [(0, 30), (28, 2), (30, 0), (32, 0), (300, 0)] {
                assert_eq!(missing(&given, length), wanted, "{length}");
            }
        }
    }

    #[test]
    fn samples_frames_and_bits_count() {
        let with = |number| {
            let mut given = Given::default();
            given.numbers.push(number);
            given
        };
        assert_eq!(missing(&with((SAMPLES_PER_PIXEL, 3)), 88), 2);
        let halved = Given {
            photometric: "YBR_FULL_422",
            ..with((SAMPLES_PER_PIXEL, 3))
        };
        assert_eq!(missing(&halved, 60), 0);
        assert_eq!(missing(&halved, 58), 2);
        for (photometric, wanted) in [("YBR_PARTIAL_422\0", 2), ("YBR_PARTIAL_420 ", 0)] {
            let padded = Given {
                photometric,
                ..with((SAMPLES_PER_PIXEL, 3))
            };
            assert_eq!(missing(&padded, 58), wanted);
        }
        let frames = Given {
            frames: "4 ",
            ..Given::default()
        };
        assert_eq!(missing(&frames, 118), 2);
        let bits = |bits| {
            let numbers = vec![(ROWS, 5), (COLUMNS, 3), (BITS_ALLOCATED, bits)];
            Given {
                numbers,
                frames: "3 ",
                ..Given::default()
            }
        };
        // 45 bits, and packed as once allowed.
        assert_eq!(missing(&bits(1), 6), 0);
        assert_eq!(missing(&bits(1), 4), 2);
        assert_eq!(missing(&bits(12), 68), 0);
        let float = Given {
            tag: FLOAT_PIXEL_DATA,
            ..Given::default()
        };
        assert_eq!(missing(&float, 60), 0);
        let double = Given {
            tag: DOUBLE_FLOAT_PIXEL_DATA,
            ..Given::default()
        };
        assert_eq!(missing(&double, 60), 60);
    }

    #[test]
    fn what_a_header_does_not_tell_is_not_missing() {
        for tag in [ROWS, COLUMNS, BITS_ALLOCATED] {
            let mut given = Given::default();
            given.numbers.retain(|(one, _)| *one != tag);
            assert_eq!(missing(&given, 0), 0);
        }
        let frames = Given {
            frames: "many",
            ..Given::default()
        };
        assert_eq!(missing(&frames, 30), 0);
        let most = Given {
            numbers: [ROWS, COLUMNS, BITS_ALLOCATED, SAMPLES_PER_PIXEL]
                .map(|tag| (tag, u16::MAX))
                .to_vec(),
            frames: "4294967295",
            ..Given::default()
        };
        assert_eq!(missing(&most, 30), u64::MAX);
    }
}
