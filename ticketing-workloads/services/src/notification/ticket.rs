//! The tickets: a PDF with a page for each seat, each with a signed code that the entrance scans.

use super::outbox::Message;
use crate::tickets::{SigningKey, Ticket};
use pdf_writer::{Content, Finish, Name, Pdf, Rect, Ref, Str};
use qrcode::{Color, EcLevel, QrCode};

/// A6, upright, in points.
const PAGE: (f32, f32) = (298.0, 420.0);
const MARGIN: f32 = 28.0;
/// Width of the code with its quiet zone.
const CODE_WIDTH: f32 = 220.0;
/// Modules of quiet around a code (ISO/IEC 18004).
const QUIET: usize = 4;
/// Letters of a line.
const LINE: usize = 38;
/// Pages at most: a booking has no more seats.
const MOST_SEATS: u8 = 10;
const FONT: Name<'static> = Name(b"F1");

/// The codes of a booking, one for each seat.
fn codes(message: &Message, key: &SigningKey) -> Vec<(u8, String)> {
    let of = u8::try_from(message.seats).unwrap_or(MOST_SEATS).min(MOST_SEATS);
    let ticket = |seat| Ticket { booking: message.booking, event: message.event_id, seat, of };
    (1..=of).map(|seat| (seat, ticket(seat).sign(key))).collect()
}

/// The code, as rows of dark and light; `None`: what it says does not fit.
fn code(text: &str) -> Option<Vec<Vec<bool>>> {
    let code = QrCode::with_error_correction_level(text, EcLevel::M).ok()?;
    let dark: Vec<bool> = code.to_colors().into_iter().map(|color| color == Color::Dark).collect();
    Some(dark.chunks(code.width()).map(<[bool]>::to_vec).collect())
}

/// The tickets as a PDF.
pub fn pdf(message: &Message, key: &SigningKey) -> Vec<u8> {
    let [catalog, pages, font] = [1, 2, 3].map(Ref::new);
    let codes = codes(message, key);
    let of = codes.len();
    let refs: Vec<_> = (0..codes.len()).map(|nth| i32::try_from(nth).unwrap_or_default() * 2 + 4).collect();
    let mut pdf = Pdf::new();
    pdf.catalog(catalog).pages(pages);
    pdf.pages(pages).kids(refs.iter().map(|nth| Ref::new(*nth))).count(i32::try_from(of).unwrap_or_default());
    pdf.type1_font(font).base_font(Name(b"Helvetica")).encoding_predefined(Name(b"WinAnsiEncoding"));
    for (nth, (seat, text)) in refs.into_iter().zip(codes) {
        let (page, content) = (Ref::new(nth), Ref::new(nth + 1));
        let mut sheet = pdf.page(page);
        sheet.media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1)).parent(pages).contents(content);
        sheet.resources().fonts().pair(FONT, font);
        sheet.finish();
        pdf.stream(content, &draw_page(message, seat, of, &text).finish());
    }
    pdf.finish()
}

fn draw_page(message: &Message, seat: u8, of: usize, code_text: &str) -> Content {
    let mut drawing = Content::new();
    let mut y = PAGE.1 - MARGIN - 16.0;
    let mut line = |drawing: &mut Content, size: f32, text: &str| {
        drawing.begin_text().set_font(FONT, size).next_line(MARGIN, y).show(Str(&win_ansi(text))).end_text();
        y -= size * 1.5;
    };
    line(&mut drawing, 18.0, "TicketWave");
    for part in wrapped(&message.event) {
        line(&mut drawing, 13.0, &part);
    }
    if let Some(starts_at) = &message.starts_at {
        line(&mut drawing, 10.0, starts_at);
    }
    line(&mut drawing, 10.0, &format!("Seat {seat} of {of}"));
    for part in wrapped(&message.user) {
        line(&mut drawing, 10.0, &part);
    }
    line(&mut drawing, 7.0, &message.booking.to_string());
    if let Some(rows) = code(code_text) {
        draw(&mut drawing, &rows);
    }
    drawing
}

/// Draws the code in the middle of the lower part of the page: in modules, each row from one dark stretch to the next, so that
/// a page has few bytes.
#[expect(clippy::cast_precision_loss, reason = "a code has at most 177 modules")]
fn draw(drawing: &mut Content, rows: &[Vec<bool>]) {
    let module = CODE_WIDTH / (rows.len() + 2 * QUIET) as f32;
    let left = (PAGE.0 - CODE_WIDTH) / 2.0;
    drawing.set_fill_gray(0.0);
    drawing.transform([module, 0.0, 0.0, module, left, MARGIN / 2.0]);
    for (y, row) in rows.iter().enumerate() {
        let bottom = rows.len() + QUIET - y - 1;
        let mut x = 0;
        for stretch in row.chunk_by(|one, next| one == next) {
            if stretch.first() == Some(&true) {
                drawing.rect((x + QUIET) as f32, bottom as f32, stretch.len() as f32, 1.0);
            }
            x += stretch.len();
        }
    }
    drawing.fill_nonzero();
}

/// Text as the font has it; what it lacks is a question mark.
fn win_ansi(text: &str) -> Vec<u8> {
    let letter = |letter: char| match letter {
        ' '..='~' | '\u{a0}'..='\u{ff}' => u8::try_from(u32::from(letter)).unwrap_or(b'?'),
        '€' => 0x80,
        '‘' => 0x91,
        '’' => 0x92,
        '“' => 0x93,
        '”' => 0x94,
        '–' => 0x96,
        '—' => 0x97,
        _ => b'?',
    };
    text.chars().map(letter).collect()
}

/// At most three lines, broken between words where that is possible.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for (nth, part) in letters.chunks(LINE).enumerate() {
            let part: String = part.iter().collect();
            match lines.last_mut() {
                Some(line) if nth == 0 && line.chars().count() + 1 + part.chars().count() <= LINE => {
                    if !line.is_empty() {
                        line.push(' ');
                    }
                    line.push_str(&part);
                }
                _ => lines.push(part),
            }
        }
    }
    lines.retain(|line| !line.is_empty());
    lines.truncate(3);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notification::outbox::Kind;
    use crate::tickets::{Code, PublicKeys};

    fn message() -> Message {
        Message::example(Kind::Ticket, "Blue Man’s Opening Night – a very long evening with many guests")
    }

    fn key() -> SigningKey {
        SigningKey::from_seed(&[1; 32]).unwrap()
    }

    /// What a camera reads from the stretches that are drawn, each module eight pixels wide.
    fn scan(page: &str) -> String {
        let mut dark = std::collections::BTreeSet::new();
        for drawn in page.lines().filter_map(|line| line.strip_suffix(" re")) {
            let numbers: Vec<usize> = drawn.split(' ').map(|number| number.parse().unwrap()).collect();
            dark.extend((numbers[0]..numbers[0] + numbers[2]).map(|x| (x, numbers[1])));
        }
        let modules = dark.iter().map(|(x, _)| x + 1).max().unwrap() + QUIET;
        let is_dark = |x: usize, y: usize| dark.contains(&(x / 8, modules - 1 - y / 8));
        let side = modules * 8;
        let mut image =
            rqrr::PreparedImage::prepare_from_greyscale(side, side, |x, y| if is_dark(x, y) { 0 } else { 255 });
        image.detect_grids()[0].decode().unwrap().1
    }

    /// Each page has the code of its seat, as a camera reads it.
    #[test]
    fn each_seat_has_a_page_with_a_genuine_code() {
        let (message, key) = (message(), key());
        let pdf = pdf(&message, &key);
        assert!(pdf.starts_with(b"%PDF-1.") && pdf.ends_with(b"%%EOF"));
        let text = String::from_utf8_lossy(&pdf);
        let pages: Vec<_> = text.split("stream\n").filter(|part| part.contains(" re\n")).collect();
        assert_eq!(pages.len(), 2);
        let keys: PublicKeys = [key.public_key()].into_iter().collect();
        for (nth, page) in (1..).zip(pages) {
            assert!(page.contains("(TicketWave)") && page.contains(&format!("(Seat {nth} of 2)")), "{page}");
            let ticket = Code::read(&scan(page)).unwrap().verify(&keys).unwrap();
            let expected = Ticket { booking: message.booking, event: message.event_id, seat: nth, of: 2 };
            assert_eq!(ticket, expected);
        }
    }

    /// A mail with the largest number of them must not be large.
    #[test]
    fn ten_tickets_are_small() {
        let pdf = pdf(&Message { seats: 10, ..message() }, &key());
        assert_eq!(String::from_utf8_lossy(&pdf).matches(" of 10)").count(), 10);
        assert!(pdf.len() < 200_000, "{}", pdf.len());
    }

    #[test]
    fn letters_that_the_font_lacks_do_no_harm() {
        assert_eq!(win_ansi("Señor 東 (1)\n"), b"Se\xf1or ? (1)?");
        assert_eq!(wrapped(&"x".repeat(1_000)).len(), 3);
        assert_eq!(wrapped("one two"), ["one two"]);
        let title = wrapped("Blue Man’s Opening Night – a very long evening");
        assert_eq!(title, ["Blue Man’s Opening Night – a very long", "evening"]);
    }
}
