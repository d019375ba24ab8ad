/* Splits the text of an arithmetic expression into tokens. */

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define TOKEN_NAME_MAX 32

enum token_kind { TOKEN_END, TOKEN_NUMBER, TOKEN_NAME, TOKEN_OPERATOR, TOKEN_ERROR };

struct token {
    enum token_kind kind;
    size_t offset; /* from the beginning of the text */
    double number;
    char name[TOKEN_NAME_MAX]; /* ends with a zero */
    char operator;
};

struct lexer {
    const char *text; /* ends with a zero */
    size_t position;
};

void lexer_init(struct lexer *lexer, const char *text)
{
    lexer->text = text;
    lexer->position = 0;
}

static bool is_name_char(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static void skip_blanks(struct lexer *lexer)
{
    while (isspace((unsigned char)lexer->text[lexer->position])) {
        lexer->position++;
    }
}

static struct token read_number(struct lexer *lexer)
{
    struct token token = {.kind = TOKEN_NUMBER, .offset = lexer->position};
    char *end;
    errno = 0;
    token.number = strtod(lexer->text + lexer->position, &end);
    if (errno == ERANGE || is_name_char(*end)) {
        token.kind = TOKEN_ERROR;
    }
    lexer->position = (size_t)(end - lexer->text);
    return token;
}

static struct token read_name(struct lexer *lexer)
{
    struct token token = {.kind = TOKEN_NAME, .offset = lexer->position};
    size_t length = 0;
    while (is_name_char(lexer->text[lexer->position])) {
        if (length < TOKEN_NAME_MAX - 1) {
            token.name[length++] = lexer->text[lexer->position];
        } else {
            token.kind = TOKEN_ERROR;
        }
        lexer->position++;
    }
    token.name[length] = '\0';
    return token;
}

/* The next token; TOKEN_END for ever once the text has ended. */
struct token lexer_next(struct lexer *lexer)
{
    skip_blanks(lexer);
    char c = lexer->text[lexer->position];
    if (c == '\0') {
        return (struct token){.kind = TOKEN_END, .offset = lexer->position};
    }
    if (isdigit((unsigned char)c)) {
        return read_number(lexer);
    }
    if (isalpha((unsigned char)c) || c == '_') {
        return read_name(lexer);
    }
    struct token token = {.kind = TOKEN_OPERATOR, .offset = lexer->position, .operator= c};
    if (strchr("+-*/^(),", c) == NULL) {
        token.kind = TOKEN_ERROR;
    }
    lexer->position++;
    return token;
}

/* How many tokens there are before the end, or before the first error. */
size_t count_tokens(const char *text, bool *valid)
{
    struct lexer lexer;
    lexer_init(&lexer, text);
    size_t count = 0;
    struct token token = lexer_next(&lexer);
    while (token.kind != TOKEN_END && token.kind != TOKEN_ERROR) {
        count++;
        token = lexer_next(&lexer);
    }
    *valid = token.kind == TOKEN_END;
    return count;
}
