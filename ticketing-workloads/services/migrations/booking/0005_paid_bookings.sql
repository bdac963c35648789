-- A booking that is to be paid for keeps its seats until somebody knows whether it was: expiry never touches it.
-- `settle_at` is when payment is asked next, by whoever comes first.
ALTER TABLE bookings
    DROP CONSTRAINT bookings_status_check,
    ADD CONSTRAINT bookings_status_check CHECK (status IN ('Held', 'PaymentPending', 'Confirmed', 'Cancelled')),
    ADD COLUMN amount_cents  integer NOT NULL DEFAULT 0 CHECK (amount_cents >= 0),
    ADD COLUMN email         text,
    ADD COLUMN settle_at     timestamptz,
    ADD COLUMN settle_tries  integer NOT NULL DEFAULT 0,
    ADD COLUMN cancel_reason text,
    ADD CONSTRAINT bookings_settle_check CHECK ((status = 'PaymentPending') = (settle_at IS NOT NULL));

CREATE INDEX bookings_to_settle ON bookings (settle_at) WHERE status = 'PaymentPending';

-- What others are to be told. Written in the transaction that makes it true, so that nothing is told that is not so, and
-- nothing is forgotten.
CREATE TABLE outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    booking_id uuid NOT NULL REFERENCES bookings (id),
    kind       text NOT NULL CHECK (kind IN ('BookingConfirmed')),
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (booking_id, kind)
);
