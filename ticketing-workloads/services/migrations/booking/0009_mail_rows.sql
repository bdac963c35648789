-- The domains of messages that were open before. In a step of its own, which locks these rows and not the table: orders go on.
UPDATE outbox SET domain = lower(split_part(email, '@', 2))
FROM bookings WHERE bookings.id = outbox.booking_id AND outbox.done_at IS NULL AND email IS NOT NULL AND outbox.domain = '';
