use std::path::Path;

use super::{stack as stack_samples, *};
use crate::image::{scan_image, scan_images};
use crate::testing::{BIG, EXPLICIT, IMPLICIT, TemporaryFile, Writer, image};

const STORED: [i32; 6] = [0, 1, 2, 3, 1024, 4095];

/// Images of one sample.
fn stack<T: Value>(
    slices: &[Slice<'_>],
    rows: usize,
    columns: usize,
    out: &mut [T],
    rescale: bool,
) -> Result<Vec<String>> {
    let matrix = Matrix {
        rows,
        columns,
        samples: 1,
    };
    stack_samples(slices, matrix, out, Reading { rescale, rgb: true })
}

fn of_bytes(bytes: &[u8]) -> Image {
    scan_image(Source::Bytes(bytes), &mut Vec::new()).unwrap()
}

#[test]
fn attributes_are_read_alike_in_every_syntax() {
    for syntax in [EXPLICIT, IMPLICIT, BIG] {
        let image = of_bytes(&image(syntax).part10(syntax));
        assert_eq!(image.sop_instance_uid, "1.2.3.4.5");
        assert_eq!(image.modality, "CT");
        assert_eq!((image.rows, image.columns, image.bits_stored), (2, 3, 12));
        assert_eq!(image.position, Some([-1.5, 2.0, 3.0]));
        assert_eq!(image.orientation, Some([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]));
        assert_eq!(image.pixel_spacing, Some([0.5, 0.25]));
        assert_eq!((image.slope, image.intercept), (1.0, -1024.0));
        assert_eq!(image.instance_number, Some(7));
        assert_eq!(image.slice_thickness, None);
        assert_eq!((image.pixel_tag, image.pixel_length), (PIXEL_DATA, 12));
    }
}

#[test]
fn absent_attributes_have_their_defaults() {
    let bytes = Writer::new(EXPLICIT).us(0x0028_0100, 16).part10(EXPLICIT);
    let image = of_bytes(&bytes);
    assert_eq!((image.bits_stored, image.high_bit), (16, 15));
    assert_eq!((image.slope, image.intercept), (1.0, 0.0));
    assert_eq!((image.samples_per_pixel, image.number_of_frames), (1, 1));
    assert_eq!(
        (image.rows, image.pixel_tag, image.is_native),
        (0, 0, false)
    );
}

#[test]
fn garbage_in_an_attribute_names_it_and_the_object() {
    let bad: [(u32, &str, &[u8]); 6] = [
        (0x0028_1053, "DS", b"one "),
        (0x0028_1053, "DS", b"nan "),
        (0x0020_0032, "DS", b"1\\2 "),
        (0x0028_0010, "US", b"\x01\x00\x01\x00"),
        (0x0028_0010, "SS", b"\xFF\xFF"),
        (0x0028_0008, "IS", b"-1"),
    ];
    for (tag, vr, value) in bad {
        let object = Writer::new(EXPLICIT).text(0x0008_0018, "UI", "1.2.3.4.5");
        let bytes = object.put(tag, vr, value).part10(EXPLICIT);
        let found = scan_images(&[Source::Bytes(&bytes)]).unwrap_err();
        assert!(matches!(found, Error::InvalidDicom(_)));
        let name = format!("1.2.3.4.5: ({:04X},{:04X}) ", tag >> 16, tag & 0xFFFF);
        assert!(found.to_string().contains(&name), "{found}");
    }
}

#[test]
fn garbage_in_the_instance_number_counts_as_absent() {
    let object = Writer::new(EXPLICIT).text(0x0008_0018, "UI", "1.2.3.4.5");
    let bytes = object.put(0x0020_0013, "IS", b"1.5 ").part10(EXPLICIT);
    let images = scan_images(&[Source::Bytes(&bytes)]).unwrap();
    assert_eq!(images[0].instance_number, None);
}

#[test]
fn first_bad_source_of_a_list_is_the_one_reported() {
    let good = image(EXPLICIT).part10(EXPLICIT);
    let mut sources = vec![Source::Bytes(&good); 200];
    sources[150] = Source::Bytes(b"no");
    sources[77] = Source::Bytes(b"no");
    let found = scan_images(&sources).unwrap_err().to_string();
    assert!(found.starts_with("object 77 of the list: "), "{found}");
    sources[77] = Source::File(Path::new("/nowhere"));
    assert!(matches!(scan_images(&sources), Err(Error::Io { .. })));
}

#[test]
fn files_and_bytes_of_every_syntax_fill_the_same_array() {
    let objects: Vec<Vec<u8>> = [EXPLICIT, IMPLICIT, BIG]
        .iter()
        .map(|syntax| image(syntax).part10(syntax))
        .collect();
    let files: Vec<TemporaryFile> = objects
        .iter()
        .map(|bytes| TemporaryFile::new(bytes))
        .collect();
    let images: Vec<Image> = objects.iter().map(|bytes| of_bytes(bytes)).collect();
    let mut slices = Vec::new();
    for ((image, bytes), file) in images.iter().zip(&objects).zip(&files) {
        slices.push(Slice {
            image,
            source: Source::Bytes(bytes),
        });
        slices.push(Slice {
            image,
            source: Source::File(file.path()),
        });
    }
    let mut out = vec![0_f32; 36];
    stack(&slices, 2, 3, &mut out, true).unwrap();
    for slice in out.chunks(6) {
        let found: Vec<i32> = slice.iter().map(|value| *value as i32 + 1024).collect();
        assert_eq!(found, STORED);
    }
    let mut out = vec![0_u16; 36];
    stack(&slices, 2, 3, &mut out, false).unwrap();
    assert_eq!(
        out[6..12].iter().map(|v| i32::from(*v)).collect::<Vec<_>>(),
        STORED
    );
    let found = stack(&slices, 2, 3, &mut out, true).unwrap_err();
    assert!(matches!(found, Error::InvalidDataset(_)));
    assert!(found.to_string().contains("-1024 to 3071"), "{found}");
}

#[test]
fn image_longer_than_a_part_is_read_whole() {
    let (rows, columns) = (301_u16, 1023_u16);
    let cells: Vec<u8> = (0..u32::from(rows) * u32::from(columns) * 2)
        .map(|i| (i * 7) as u8)
        .collect();
    let object = Writer::new(EXPLICIT)
        .us(0x0028_0010, rows)
        .us(0x0028_0011, columns)
        .us(0x0028_0100, 16)
        .put(0x7FE0_0010, "OW", &cells)
        .part10(EXPLICIT);
    let file = TemporaryFile::new(&object);
    let image = of_bytes(&object);
    let slice = Slice {
        image: &image,
        source: Source::File(file.path()),
    };
    let mut out = vec![0_u16; cells.len() / 2];
    stack(&[slice], rows.into(), columns.into(), &mut out, true).unwrap();
    for (out, cell) in out.iter().zip(cells.chunks(2)) {
        assert_eq!(out.to_le_bytes(), cell);
    }
}

/// An object of so many samples, frames, rows and columns.
fn object(shape: [u16; 4], bits: u16, photometric: &str, planar: u16, pixels: &[u8]) -> Vec<u8> {
    let [samples, frames, rows, columns] = shape;
    Writer::new(EXPLICIT)
        .us(0x0028_0002, samples)
        .text(0x0028_0004, "CS", photometric)
        .us(0x0028_0006, planar)
        .text(0x0028_0008, "IS", &frames.to_string())
        .us(0x0028_0010, rows)
        .us(0x0028_0011, columns)
        .us(0x0028_0100, bits)
        .put(0x7FE0_0010, "OB", pixels)
        .part10(EXPLICIT)
}

/// The stored values of all frames, from memory and from a file.
fn frames_of(bytes: &[u8], rgb: bool) -> Result<Vec<u8>> {
    let file = TemporaryFile::new(bytes);
    let whole = of_bytes(bytes);
    let matrix = Matrix {
        rows: whole.rows as usize,
        columns: whole.columns as usize,
        samples: whole.samples_per_pixel as usize,
    };
    let mut found: Vec<Vec<u8>> = Vec::new();
    for source in [Source::Bytes(bytes), Source::File(file.path())] {
        let frames = crate::image::frames(&whole, source)?;
        let slices: Vec<_> = frames.iter().map(|image| Slice { image, source }).collect();
        let size = matrix.rows * matrix.columns * matrix.samples;
        let mut out = vec![77; slices.len() * size];
        let reading = Reading { rescale: true, rgb };
        stack_samples(&slices, matrix, &mut out, reading)?;
        found.push(out);
    }
    assert_eq!(found[0], found[1]);
    Ok(found.remove(0))
}

#[test]
fn samples_lie_one_pixel_after_the_other_whatever_the_file_has() {
    let planes = object(
        [3, 2, 1, 2],
        8,
        "RGB",
        1,
        &[1, 4, 2, 5, 3, 6, 7, 9, 8, 10, 0, 11],
    );
    let expected = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 10, 11];
    assert_eq!(frames_of(&planes, true).unwrap(), expected);
    let pixels = object([3, 2, 1, 2], 8, "RGB", 0, &expected);
    assert_eq!(frames_of(&pixels, true).unwrap(), expected);
    let shared = object([3, 1, 1, 2], 8, "YBR_FULL_422", 0, &[50, 60, 128, 128]);
    assert_eq!(
        frames_of(&shared, false).unwrap(),
        [50, 128, 128, 60, 128, 128]
    );
    assert_eq!(frames_of(&shared, true).unwrap(), [50, 50, 50, 60, 60, 60]);
    let odd = object([3, 1, 2, 1], 8, "YBR_FULL_422", 0, &[50, 60, 128, 128]);
    assert!(frames_of(&odd, true).is_err());
}

#[test]
fn single_bits_follow_each_other_across_frames() {
    let bits = object([1, 3, 1, 3], 1, "MONOCHROME2", 0, &[0b1010_0110, 0b1]);
    assert_eq!(frames_of(&bits, true).unwrap(), [0, 1, 1, 0, 0, 1, 0, 1, 1]);
    let short = object([1, 6, 1, 3], 1, "MONOCHROME2", 0, &[0b1010_0110, 0b1]);
    assert!(frames_of(&short, true).is_err());
}

#[test]
fn bytes_after_the_last_pixel_are_told_but_for_the_padding() {
    for (size, notes) in [(6, 0), (7, 1), (9, 1)] {
        let bytes = object([1, 1, 1, 5], 8, "MONOCHROME2", 0, &vec![1; size]);
        let image = of_bytes(&bytes);
        let slice = Slice {
            image: &image,
            source: Source::Bytes(&bytes),
        };
        let found = stack(&[slice], 1, 5, &mut [0_u8; 5], true).unwrap();
        assert_eq!(found.len(), notes, "{size}");
    }
}

#[test]
fn what_cannot_be_stacked_is_refused_before_any_pixel() {
    let bytes = image(EXPLICIT).part10(EXPLICIT);
    let good = of_bytes(&bytes);
    let refuse = |change: &dyn Fn(&mut Image)| {
        let mut image = good.clone();
        change(&mut image);
        let slices = [
            Slice {
                image: &good,
                source: Source::Bytes(&bytes),
            },
            Slice {
                image: &image,
                source: Source::Bytes(&bytes),
            },
        ];
        let mut out = vec![-7.0_f32; 12];
        let error = stack(&slices, 2, 3, &mut out, true).unwrap_err();
        assert!(out.iter().all(|value| *value == -7.0));
        assert!(error.to_string().contains("1.2.3.4.5"), "{error}");
        error
    };
    let invalid: [&dyn Fn(&mut Image); 10] = [
        &|image| image.samples_per_pixel = 3,
        &|image| image.pixel_tag = 0x7FE0_0008,
        &|image| image.pixel_length = 11,
        &|image| image.rows = 3,
        &|image| image.columns = 65_536,
        &|image| image.bits_stored = 0,
        &|image| image.bits_stored = 17,
        &|image| image.high_bit = 10,
        &|image| image.slope = 0.0,
        &|image| image.intercept = f64::NAN,
    ];
    for change in invalid {
        assert!(matches!(refuse(change), Error::InvalidDicom(_)));
    }
    let unsupported: [&dyn Fn(&mut Image); 3] = [
        &|image| image.is_native = false,
        &|image| image.bits_allocated = 12,
        &|image| image.bits_allocated = 64,
    ];
    for change in unsupported {
        assert!(matches!(refuse(change), Error::UnsupportedImage(_)));
    }
}

#[test]
fn file_that_shrank_since_the_scan_is_an_error() {
    let bytes = image(EXPLICIT).part10(EXPLICIT);
    let image = of_bytes(&bytes);
    let file = TemporaryFile::new(&bytes[..bytes.len() - 1]);
    let slice = Slice {
        image: &image,
        source: Source::File(file.path()),
    };
    let found = stack(&[slice], 2, 3, &mut [0_f32; 6], true).unwrap_err();
    assert!(
        found
            .to_string()
            .contains("expected at least 12 bytes, found 11"),
        "{found}"
    );
}

#[test]
fn panic_of_a_worker_reaches_the_caller() {
    let outcome = std::panic::catch_unwind(|| {
        parallel(
            0..100,
            4,
            || (),
            |(), item| if item == 50 { panic!() } else { Ok(item) },
        )
    });
    assert!(outcome.is_err());
    assert_eq!(
        parallel(0..100, 4, || (), |(), n| Ok(n)).unwrap(),
        (0..100).collect::<Vec<_>>()
    );
}
