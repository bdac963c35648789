-- What the catalog shows. An event without a price is free: nothing is to be paid for it.
ALTER TABLE events
    ADD COLUMN category    text NOT NULL DEFAULT 'concert',
    ADD COLUMN price_cents integer NOT NULL DEFAULT 0 CHECK (price_cents >= 0),
    ADD COLUMN starts_at   timestamptz;

CREATE INDEX events_by_category ON events (category, created_at, id);

UPDATE events SET price_cents = 4500, starts_at = '2027-06-18T19:30:00Z'
WHERE id = '11111111-1111-4111-8111-111111111111';
