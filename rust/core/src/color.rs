//! Samples of colour: from how a frame holds them to one pixel after the other, in RGB.
//!
//! The problem: three samples of a pixel lie side by side or in three planes, two pixels may share
//! their chrominance, and they may be luminance and chrominance instead of red, green and blue
//! (PS3.3 C.7.6.3.1.2, C.7.6.3.1.3). Whoever computes with them wants one kind.

use crate::error::{Error, Result};

const PHOTOMETRIC: u32 = 0x0028_0004;

/// What the three samples of a pixel are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Space {
    /// Red, green and blue; or anything that is not transformed.
    #[default]
    Rgb,
    /// Luminance and two chrominances.
    Ybr,
}

/// How the samples of uncompressed pixels lie in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Sample after sample.
    Pixels,
    /// Plane after plane.
    Planes,
    /// Two luminances, then the chrominances that they share.
    Shared,
}

/// What an image says of its samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colors {
    pub space: Space,
    pub layout: Layout,
}

impl Colors {
    /// Check Photometric Interpretation, Samples per Pixel and Planar Configuration.
    ///
    /// Errors: [`Error::InvalidDicom`] where they contradict each other;
    /// [`Error::UnsupportedImage`] for the retired ones, and for one that only videos have.
    pub fn new(photometric: &str, samples: u32, planar: u32, is_native: bool) -> Result<Self> {
        let wrong = |message: String| Err(Error::invalid_at(PHOTOMETRIC, message));
        let one = photometric.starts_with("MONOCHROME") || photometric == "PALETTE COLOR";
        if one != (samples == 1) && !photometric.is_empty() {
            return wrong(format!(
                "expected an interpretation for {samples} SamplesPerPixel, found {photometric}"
            ));
        }
        let space = match photometric {
            _ if one => Space::Rgb,
            "" if samples == 1 => Space::Rgb,
            "RGB" if samples == 3 => Space::Rgb,
            // What a decoder of JPEG XL gives is RGB.
            "XYB" if samples == 3 && !is_native => Space::Rgb,
            "YBR_FULL" | "YBR_FULL_422" if samples == 3 => Space::Ybr,
            // What the decoder of JPEG 2000 undoes itself.
            "YBR_ICT" | "YBR_RCT" if samples == 3 && !is_native => Space::Rgb,
            "YBR_PARTIAL_422" | "YBR_PARTIAL_420" | "HSV" | "ARGB" | "CMYK" => {
                let message = "expected RGB, YBR_FULL or YBR_FULL_422";
                let message = format!("{message}, found {photometric}");
                return Err(Error::unsupported(message).at(PHOTOMETRIC));
            }
            _ => {
                let kind = if is_native {
                    "uncompressed"
                } else {
                    "compressed"
                };
                return wrong(format!(
                    "expected an interpretation for {kind} pixels of {samples} samples, found \
                     {photometric:?}"
                ));
            }
        };
        let layout = match planar {
            _ if samples == 1 => Layout::Pixels,
            _ if is_native && photometric == "YBR_FULL_422" => Layout::Shared,
            0 => Layout::Pixels,
            1 => Layout::Planes,
            found => {
                let message = format!("expected 0 or 1, found {found}");
                return Err(Error::invalid_at(0x0028_0006, message));
            }
        };
        Ok(Colors { space, layout })
    }

    /// Bytes of a frame of so many pixels, whose whole samples take `all` bytes.
    pub fn bytes(&self, all: u64) -> u64 {
        match self.layout {
            Layout::Shared => all / 3 * 2,
            _ => all,
        }
    }
}

/// Put the samples of `frame` one pixel after the other; `cell` is the size of a sample.
pub(crate) fn arrange(layout: Layout, frame: &[u8], cell: usize, samples: usize, into: &mut [u8]) {
    match layout {
        Layout::Pixels => into.copy_from_slice(frame.get(..into.len()).unwrap_or_default()),
        Layout::Planes => {
            let planes = frame.chunks_exact((into.len() / samples).max(1));
            for (k, plane) in planes.take(samples).enumerate() {
                match cell {
                    1 => spread::<1>(plane, into, k, samples),
                    2 => spread::<2>(plane, into, k, samples),
                    _ => spread::<4>(plane, into, k, samples),
                }
            }
        }
        Layout::Shared => {
            let pairs = frame.chunks_exact(4 * cell);
            for (pair, into) in pairs.zip(into.chunks_exact_mut(6 * cell)) {
                let part = |at: usize| pair.get(at * cell..(at + 1) * cell).unwrap_or_default();
                for (place, at) in into.chunks_exact_mut(cell).zip([0, 2, 3, 1, 2, 3]) {
                    place.copy_from_slice(part(at));
                }
            }
        }
    }
}

fn spread<const N: usize>(plane: &[u8], into: &mut [u8], at: usize, step: usize) {
    let (cells, _) = into.as_chunks_mut::<N>();
    let (values, _) = plane.as_chunks::<N>();
    for (cell, value) in cells.iter_mut().skip(at).step_by(step).zip(values) {
        *cell = *value;
    }
}

/// YBR_FULL to RGB in place, cells of 8 or 16 bits (little endian) with `bits` that count; those
/// above are dropped.
///
/// The sum is rounded to the nearest and cut to the range (PS3.3 C.7.6.3.1.2).
pub(crate) fn to_rgb(cells: &mut [u8], cell: usize, bits: u32) {
    let middle = f64::from(1_u32 << (bits - 1));
    let mask = (1_u32 << bits) - 1;
    let top = f64::from(mask);
    let convert = |[y, cb, cr]: [f64; 3]| {
        let (cb, cr) = (cb - middle, cr - middle);
        let red = y + 1.402 * cr;
        let green = y - 0.344_136 * cb - 0.714_136 * cr;
        let blue = y + 1.772 * cb;
        [red, green, blue].map(|sample| (sample + 0.5).clamp(0.0, top) as u16)
    };
    if cell == 1 {
        let (pixels, _) = cells.as_chunks_mut::<3>();
        for pixel in pixels {
            let samples = pixel.map(|sample| f64::from(u32::from(sample) & mask));
            *pixel = convert(samples).map(|sample| sample as u8);
        }
    } else {
        let (pixels, _) = cells.as_chunks_mut::<6>();
        for pixel in pixels {
            let [a, b, c, d, e, f] = *pixel;
            let samples = [[a, b], [c, d], [e, f]]
                .map(|cell| f64::from(u32::from(u16::from_le_bytes(cell)) & mask));
            let [r, g, b] = convert(samples).map(u16::to_le_bytes);
            *pixel = [r[0], r[1], g[0], g[1], b[0], b[1]];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow([y, cb, cr]: [u8; 3]) -> [u8; 3] {
        let (y, cb, cr) = (f64::from(y), f64::from(cb) - 128.0, f64::from(cr) - 128.0);
        let sums = [
            y + 1.402 * cr,
            y - 0.344_136 * cb - 0.714_136 * cr,
            y + 1.772 * cb,
        ];
        sums.map(|sum| (sum + 0.5).floor().clamp(0.0, 255.0) as u8)
    }

    #[test]
    fn every_pixel_of_eight_bits_is_the_rounded_sum() {
        for y in 0..=255_u8 {
            let all: Vec<[u8; 3]> = (0..=255_u8)
                .flat_map(|cb| (0..=255_u8).step_by(3).map(move |cr| [y, cb, cr]))
                .collect();
            let mut cells = all.as_flattened().to_vec();
            to_rgb(&mut cells, 1, 8);
            let expected: Vec<u8> = all.iter().flat_map(|pixel| slow(*pixel)).collect();
            assert_eq!(cells, expected, "{y}");
        }
    }

    #[test]
    fn sixteen_bits_are_those_of_eight_where_they_are_the_same_numbers() {
        let wide: Vec<u8> = [100_u16, 90, 200, 255, 128, 128]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        let mut cells = wide.clone();
        to_rgb(&mut cells, 2, 8);
        let expected: Vec<u8> = [slow([100, 90, 200]), slow([255, 128, 128])]
            .as_flattened()
            .iter()
            .flat_map(|n| u16::from(*n).to_le_bytes())
            .collect();
        assert_eq!(cells, expected);
    }

    #[test]
    fn planes_and_shared_chrominance_become_pixels() {
        let mut pixels = [0; 6];
        arrange(Layout::Planes, &[1, 4, 2, 5, 3, 6], 1, 3, &mut pixels);
        assert_eq!(pixels, [1, 2, 3, 4, 5, 6]);
        arrange(Layout::Shared, &[1, 4, 8, 9], 1, 3, &mut pixels);
        assert_eq!(pixels, [1, 8, 9, 4, 8, 9]);
        let mut wide = [0; 8];
        arrange(Layout::Planes, &[1, 0, 3, 0, 2, 0, 4, 0], 2, 2, &mut wide);
        assert_eq!(wide, [1, 0, 2, 0, 3, 0, 4, 0]);
    }

    #[test]
    fn contradictions_are_errors() {
        assert!(Colors::new("RGB", 1, 0, true).is_err());
        assert!(Colors::new("MONOCHROME2", 3, 0, true).is_err());
        assert!(Colors::new("RGB", 3, 2, true).is_err());
        assert!(Colors::new("YBR_RCT", 3, 0, true).is_err());
        for (name, samples) in [
            ("YBR_PARTIAL_420", 3),
            ("HSV", 3),
            ("CMYK", 4),
            ("RGB", 4),
            ("FOO", 3),
            ("", 3),
            ("YBR_ICT", 4),
        ] {
            assert!(Colors::new(name, samples, 0, false).is_err(), "{name}");
        }
        assert_eq!(
            Colors::new("YBR_RCT", 3, 0, false).unwrap().space,
            Space::Rgb
        );
    }
}
