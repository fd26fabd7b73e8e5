(** Frobenius norm and orthogonal projectors

    Lemmas for eckart_young.v, least_squares.v and best_low_rank_steer.v:
      frob A      squared Frobenius norm, tr(A^T A)
      proj B      orthogonal projector onto col(B), of trace rank(B)

    Everything holds over any ordered field: the projector is built from a basis of
    the column space, without square roots. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Frobenius.
Variable R : realFieldType.

(** ||A||_F^2 = tr(A^T A) *)
Definition frob m n (A : 'M[R]_(m, n)) : R := \tr (A^T *m A).

(** ||A||_F^2 is the sum of the squared norms of the columns. *)
Lemma frobE m n (A : 'M[R]_(m, n)) : frob A = \sum_j sqn (col j A).
Proof.
apply: eq_bigr => j _; rewrite /sqn dotE !mxE.
by apply: eq_bigr => i _; rewrite !mxE.
Qed.

(** ||A||_F^2 >= 0 *)
Lemma frob_ge0 m n (A : 'M[R]_(m, n)) : 0 <= frob A.
Proof. by rewrite frobE sumr_ge0 // => j _; exact: sqn_ge0. Qed.

(** ||A||_F^2 = 0 only for A = 0. *)
Lemma frob_eq0 m n (A : 'M[R]_(m, n)) : frob A = 0 -> A = 0.
Proof.
rewrite frobE => /eqP; rewrite psumr_eq0 => [|j _]; last exact: sqn_ge0.
move=> /allP s0; apply/matrixP=> i j.
have := s0 j (mem_index_enum j); rewrite /= sqn_eq0 => /eqP c0.
by have := congr1 (fun v : 'cV_m => v i 0) c0; rewrite !mxE.
Qed.

(** A^T B = 0 gives ||A + B||^2 = ||A||^2 + ||B||^2. *)
Lemma frobD_orth m n (A B : 'M[R]_(m, n)) :
  A^T *m B = 0 -> frob (A + B) = frob A + frob B.
Proof.
move=> AB0; have BA0 : B^T *m A = 0 by apply: trmx_inj; rewrite trmx_mul trmxK AB0 trmx0.
rewrite /frob; have -> : (A + B)^T = A^T + B^T by rewrite linearD.
rewrite mulmxDl !mulmxDr AB0 BA0 addr0 add0r.
exact: mxtraceD.
Qed.

(** ||A^T|| = ||A|| *)
Lemma frob_tr m n (A : 'M[R]_(m, n)) : frob A^T = frob A.
Proof. by rewrite /frob trmxK mxtrace_mulC. Qed.

(** For a vector both norms agree. *)
Lemma sqn_frob m (v : 'cV[R]_m) : sqn v = frob v.
Proof. by rewrite /frob /mxtrace big_ord1. Qed.
End Frobenius.

Section Projector.
Variables (R : realFieldType) (m n : nat) (B : 'M[R]_(m, n)).
Let C := col_base B.
Let G := C^T *m C.

(** The Gram matrix of a basis of col(B) is invertible. *)
Lemma gram_unit : G \in unitmx.
Proof.
rewrite -row_free_unit; apply: inj_row_free => v vG0.
have : sqn (C *m v^T) == 0.
  by rewrite /sqn /dot trmx_mul trmxK mulmxA -(mulmxA v) vG0 mul0mx mxE.
rewrite sqn_eq0 => /eqP Cv0; apply: trmx_inj.
by rewrite -[LHS]mul1mx -(mulVpmx (col_base_full B)) -mulmxA Cv0 mulmx0 trmx0.
Qed.

(** The orthogonal projector onto col(B): C (C^T C)^-1 C^T, C a basis of col(B). *)
Definition proj : 'M[R]_m := C *m invmx G *m C^T.

(** proj is symmetric. *)
Lemma proj_tr : proj^T = proj.
Proof.
have GT : G^T = G by rewrite /G trmx_mul trmxK.
by rewrite /proj (trmx_mul (_ *m _)) (trmx_mul C) trmxK trmx_inv GT mulmxA.
Qed.

(** proj is idempotent. *)
Lemma proj_idem : proj *m proj = proj.
Proof.
have -> : proj *m proj = C *m (invmx G *m G) *m invmx G *m C^T.
  by rewrite /proj /G !mulmxA.
by rewrite mulVmx ?gram_unit // mulmx1.
Qed.

(** proj fixes B. *)
Lemma proj_id : proj *m B = B.
Proof.
have projC : proj *m C = C *m (invmx G *m G) by rewrite /proj /G !mulmxA.
rewrite mulVmx ?gram_unit // mulmx1 in projC.
by rewrite -[B in _ *m B]mulmx_base mulmxA projC mulmx_base.
Qed.

(** The columns of proj lie in col(B). *)
Lemma proj_colspan : in_colspan proj B.
Proof.
have CE : C = B *m pinvmx (row_base B).
  rewrite -[B in B *m _]mulmx_base -mulmxA mulmxVp ?row_base_free //.
  by rewrite mulmx1.
apply/colspanP; exists (pinvmx (row_base B) *m invmx G *m C^T).
by rewrite /proj {1}CE !mulmxA.
Qed.

(** tr(proj) = rank(B) *)
Lemma proj_trace : \tr proj = (\rank B)%:R.
Proof.
rewrite /proj -mulmxA mxtrace_mulC -mulmxA [X in \tr X]mulVmx ?mxtrace1 //.
exact: gram_unit.
Qed.
End Projector.

Section FrobeniusProjection.
Variable R : realFieldType.

(** An orthogonal projector Q splits the squared norm: ||A||^2 = ||Q A||^2 + ||(1 - Q) A||^2. *)
Lemma frob_split m n (Q : 'M[R]_m) (A : 'M_(m, n)) : Q^T = Q -> Q *m Q = Q ->
  frob A = frob (Q *m A) + frob ((1%:M - Q) *m A).
Proof.
move=> Qt QQ; rewrite -frobD_orth; first by rewrite -mulmxDl addrC subrK mul1mx.
by rewrite trmx_mul Qt -mulmxA (mulmxA Q) mulmxBr mulmx1 QQ subrr mul0mx mulmx0.
Qed.

(** Orthonormal columns U keep the norm: ||U A|| = ||A||. *)
Lemma frob_isom m n p (U : 'M[R]_(m, p)) (A : 'M_(p, n)) :
  U^T *m U = 1%:M -> frob (U *m A) = frob A.
Proof. by move=> UU; rewrite /frob trmx_mul -mulmxA (mulmxA U^T) UU mul1mx. Qed.

(** Orthonormal columns V keep the norm on the right: ||A V^T|| = ||A||. *)
Lemma frob_isomr m n p (V : 'M[R]_(n, p)) (A : 'M_(m, p)) :
  V^T *m V = 1%:M -> frob (A *m V^T) = frob A.
Proof. by move=> VV; rewrite -frob_tr trmx_mul trmxK frob_isom // frob_tr. Qed.

(** U^T does not increase the norm: ||U^T A|| <= ||A||. *)
Lemma frob_contract m n p (U : 'M[R]_(m, p)) (A : 'M_(m, n)) :
  U^T *m U = 1%:M -> frob (U^T *m A) <= frob A.
Proof.
move=> UU; have Qt : (U *m U^T)^T = U *m U^T by rewrite trmx_mul trmxK.
have QQ : U *m U^T *m (U *m U^T) = U *m U^T.
  by rewrite mulmxA -(mulmxA U) UU mulmx1.
by rewrite (frob_split A Qt QQ) -(mulmxA U) (frob_isom _ UU) le_addl frob_ge0.
Qed.

(** ||A diag(s)||^2 = sum_j s_j^2 ||A_j||^2 *)
Lemma frob_diag m p (A : 'M[R]_(m, p)) (s : 'rV_p) :
  frob (A *m diag_mx s) = \sum_j s 0 j ^+ 2 * sqn (col j A).
Proof.
rewrite frobE; apply: eq_bigr => j _; rewrite /sqn !dotE mulr_sumr.
by apply: eq_bigr => i _; rewrite mul_mx_diag !mxE mulrACA -expr2 mulrC.
Qed.
End FrobeniusProjection.
